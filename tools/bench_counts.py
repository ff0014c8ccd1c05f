"""What tools/bench.py counts apart from time: casts in compiled graphs, memory, launches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor import compile_fx
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.peak import peak_bytes as peak_bytes_on_cpu

_CASTS = ("aten::_to_copy", "prims::convert_element_type")


class Casts:
    """Conversions from one floating dtype to another, in all graphs that Inductor was given.

    Attributes:
        count: How many there are.
        bytes: What they read and write, each by itself; Inductor fuses most of them.
    """

    def __init__(self) -> None:
        self.count = self.bytes = 0

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Count in what is compiled inside the block; no cache of AOTAutograd's may be on."""
        original = compile_fx._compile_fx_inner

        def watched(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            for node in gm.graph.nodes:
                self._note(node)
            return original(gm, *args, **kwargs)

        with mock.patch.object(compile_fx, "_compile_fx_inner", watched):
            yield

    def _note(self, node: fx.Node) -> None:
        schema: Any = getattr(node.target, "_schema", None)
        if schema is None or schema.name not in _CASTS:
            return
        before, after = node.args[0].meta["val"], node.meta["val"]
        both_float = before.is_floating_point() and after.is_floating_point()
        if both_float and before.dtype is not after.dtype:
            self.count += 1
            self.bytes += int(before.numel()) * (before.dtype.itemsize + after.dtype.itemsize)


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """How many bytes a step takes at once, beyond what is there already."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return peak_bytes_on_cpu(step)


def launches(step: Callable[[], Any], device: str) -> int | None:
    """How many kernels a step runs on a GPU."""
    if device != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in profiler.events())
