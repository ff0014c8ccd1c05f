"""16-bit copies of several parameters at once: one kernel, and one node in autograd's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from mpgraph.ops import TENSORS, beside, enter, is_watched, lower, recall, remember, unscale

# Autograd runs what is ready in order of these numbers, which rise as nodes are made. The copies
# are made before everything else of a graph, and would be last. Only what adds up a parameter's
# gradient has a higher number.
_SOON = 2**62


def copy_all(
    xs: Sequence[torch.Tensor], dtype: torch.dtype, scale: torch.Tensor | None
) -> list[torch.Tensor]:
    """``x.to(dtype)`` of each, or with a scale ``lower(x, dtype, scale)``: the same, to the bit.

    In the dtype that they have, they are not copied: only their gradients change.

    Gradients arrive at all of them before any of them leaves. One that gets none has none.
    A tensor that is no plain fp32 one, or has a hook, is copied by itself, since a hook would be
    called without a gradient too; so is everything while something traces or transforms.
    """
    if len(xs) == 1 or _is_traced():
        return [_copy(x, dtype, scale) for x in xs]
    groups: dict[Any, list[int]] = {}
    for index, x in enumerate(xs):
        key = (x.device, x.requires_grad) if _is_simple(x) else index
        groups.setdefault(key, []).append(index)
    copies: list[Any] = [None] * len(xs)
    for indices in groups.values():
        alike = [xs[index] for index in indices]
        made = [_copy(alike[0], dtype, scale)] if len(alike) == 1 else _group(alike, dtype, scale)
        for index, copy in zip(indices, made, strict=True):
            copies[index] = copy
    return copies


def _copy(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is not None and x.dtype is dtype:
        return enter(x, scale)
    return x.to(dtype) if scale is None else lower(x, dtype, scale)


def _is_traced() -> bool:
    return (
        torch.compiler.is_compiling()
        or is_watched()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _is_simple(x: torch.Tensor) -> bool:
    return (
        type(x) in TENSORS
        and x.dtype is torch.float32
        and x.layout is torch.strided
        and not x._backward_hooks
    )


def _group(
    xs: list[torch.Tensor], dtype: torch.dtype, scale: torch.Tensor | None
) -> list[torch.Tensor]:
    if xs[0].requires_grad and torch.is_grad_enabled():
        return list(cast(Any, _GroupCopy).apply(dtype, scale, *xs))
    return xs if dtype is torch.float32 else _cast_all(xs, dtype)


def _cast_all(xs: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Where autograd records nothing."""
    copies = [torch.empty_like(x, dtype=dtype) for x in xs]
    torch._foreach_copy_(copies, xs)
    return copies


class _GroupCopy(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, scale: torch.Tensor | None, *xs: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx._set_sequence_nr(_SOON)
        ctx.scale = scale
        if scale is not None:
            remember(ctx, xs[0], scale)
        if dtype is torch.float32:
            return tuple([x.detach() for x in xs])
        return tuple(_cast_all([*xs], dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        scale = None if ctx.scale is None else recall(ctx)
        given = [g for g in gradients if g is not None]
        if not given:
            return None, None, *gradients
        alone = torch.is_grad_enabled() or is_watched() or not all(map(_is_dense, given))
        results = iter((_out_each if alone else _out_all)(given, scale))
        return None, None, *[None if g is None else next(results) for g in gradients]


def _is_dense(gradient: Any) -> bool:
    return type(gradient) is torch.Tensor and gradient.layout is torch.strided


def _out_each(gradients: list[Any], scale: torch.Tensor | None) -> list[torch.Tensor]:
    """The gradients of the parameters, by operators that are differentiable in their turn."""
    if scale is None:
        return [gradient.to(torch.float32) for gradient in gradients]
    return [unscale(gradient, torch.float32, scale) for gradient in gradients]


def _out_all(gradients: list[Any], scale: torch.Tensor | None) -> list[torch.Tensor]:
    if scale is not None and gradients[0].dtype is torch.float32:
        return list(torch._foreach_div(gradients, beside(gradients[0], scale)))
    results = _cast_all(gradients, torch.float32)
    if scale is not None:
        torch._foreach_div_(results, beside(results[0], scale))
    return results
