"""Whether all gradients of an optimizer are finite, as one flag on the device."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer


def gradients_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """The gradients of every parameter, as dense tensors that share their memory.

    Of a sparse gradient, the values; of a distributed one, what is on this rank.
    """
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [_dense(p) for p in parameters if p.grad is not None]


def _dense(parameter: torch.Tensor) -> torch.Tensor:
    gradient: Any = parameter.grad
    if gradient.is_sparse:
        if gradient.dtype is torch.float16:  # values of one index can overflow when added
            gradient = parameter.grad = gradient.coalesce()
        gradient = gradient._values()
    if hasattr(gradient, "to_local"):
        gradient = gradient.to_local()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


@torch.no_grad()
def find_non_finite(
    gradients: list[torch.Tensor], max_norm: float | None = None, process_group: Any = None
) -> torch.Tensor:
    """1.0 if any gradient is infinite or NaN, else 0.0; nobody waits for it.

    With ``max_norm``, gradients are clipped, and the flag comes from their norm at no further
    cost: a norm that overflows float32 counts as an overflow, since clipping by it would leave
    nothing.
    """
    if max_norm is None:
        found = _flag(gradients)
    else:
        found = is_not_finite(clip_to_norm(gradients, max_norm))
    return _agree(found, process_group)


def clip_to_norm(
    gradients: Sequence[torch.Tensor], max_norm: float, foreach: bool | None = None
) -> torch.Tensor:
    """Scale gradients down, in place, as ``torch.nn.utils.clip_grad_norm_`` does; their norm."""
    norm = get_total_norm(gradients, foreach=foreach)
    holders: list[Any] = [_Holder(gradient) for gradient in gradients]
    clip_grads_with_norm_(holders, max_norm, norm, foreach=foreach)
    return norm


def is_not_finite(norm: torch.Tensor) -> torch.Tensor:
    """1.0 if a norm is infinite or NaN, else 0.0."""
    return norm.isfinite().logical_not().to(torch.float32)


class _Holder:
    """Stands in for a parameter, of which clipping looks at the gradient only."""

    def __init__(self, grad: torch.Tensor) -> None:
        self.grad = grad


def _flag(gradients: list[torch.Tensor]) -> torch.Tensor:
    """One pass of the kernel that torch.amp.GradScaler uses, with a scale of 1."""
    groups: dict[Any, list[torch.Tensor]] = collections.defaultdict(list)
    for gradient in gradients:
        groups[gradient.device, gradient.dtype].append(gradient)
    flags: dict[torch.device, torch.Tensor] = {}
    for (device, _), group in groups.items():
        flag = flags.setdefault(device, torch.zeros((), device=device))
        one = torch.ones((), device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(group, flag, one)
    first, *others = flags.values()
    for other in others:
        first = torch.maximum(first, other.to(first.device, non_blocking=True))
    return first


def _agree(found: torch.Tensor, process_group: Any) -> torch.Tensor:
    """The same flag on every rank: a step is skipped by all of them or by none."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX, group=process_group)
    return found
