"""Operators that torch refuses in 16 bit, under ``torch.autocast`` too, looked at in fp32.

A capture runs a model on values of the compute dtype before any pass decides. What these operators
are given is widened then, so that the graph has them, and a policy that runs them in fp32 can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from mpgraph import ir
from mpgraph.python_kernels import PythonKernels

aten = torch.ops.aten
_KEY = DispatchKey.CompositeImplicitAutograd

_COMPOSITE: tuple[OpOverload, ...] = (
    aten.linalg_slogdet.default,
    aten.logdet.default,
    aten.linalg_vander.default,
)


def _looked_at(target: OpOverload) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(torch.Tensor, _widened, (args, kwargs))
        return target._op_dk(_KEY, *args, **kwargs)

    return kernel


def _pinv(mode: Any, target: Any, x: torch.Tensor, *rest: Any, **options: Any) -> Any:
    return torch.empty_like(_widened(x).mT)


def _widened(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype in ir.ELIGIBLE else value


looked_at_in_fp32 = PythonKernels(
    {target: _looked_at(target) for target in _COMPOSITE},
    _KEY,
    fakes={aten.linalg_pinv.atol_rtol_tensor: _pinv},
)
"""While this is active, these operators yield for 16-bit values what they do for fp32 ones."""
