"""Enough of torchvision to import timm where torchvision is not installed.

timm imports torchvision for its data transforms, which no model here runs, and for
``FrozenBatchNorm2d``, which models are built from. The first are placeholders, the second is
real. The stand-in is there only while timm is imported: left in ``sys.modules``, transformers
would take it for torchvision itself.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_MODULES = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.datasets",
    "torchvision.ops",
    "torchvision.ops.misc",
)


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm2d with fixed statistics and fixed affine parameters, all of them buffers."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class InterpolationMode(enum.Enum):
    """The names that timm's tables of data transforms are keyed by."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Stub(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        placeholder = type(name, (), {"__module__": self.__name__})
        setattr(self, name, placeholder)
        return placeholder


def _stub_modules() -> dict[str, types.ModuleType]:
    stubs: dict[str, types.ModuleType] = {name: _Stub(name) for name in _MODULES}
    for name, stub in stubs.items():
        stub.__path__ = []  # a package, whose submodules are below
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stubs[parent], child, stub)
    functional = stubs["torchvision.transforms.functional"]
    functional.InterpolationMode = InterpolationMode  # type: ignore[attr-defined]
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d = FrozenBatchNorm2d  # type: ignore[attr-defined]
    return stubs


@contextlib.contextmanager
def torchvision_standin() -> Iterator[bool]:
    """Offer the stand-in inside the ``with`` block; yield whether it was needed.

    Does nothing where torchvision is installed.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield False
        return
    stubs = _stub_modules()
    sys.modules.update(stubs)
    try:
        yield True
    finally:
        for name in stubs:
            sys.modules.pop(name, None)


def import_timm() -> types.ModuleType:
    """``import timm``, with the stand-in if it is needed."""
    with torchvision_standin():
        return importlib.import_module("timm")
