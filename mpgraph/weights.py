"""The 16-bit copies of parameters, made again only when the parameter has changed."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from mpgraph.group_copies import copy_all

_caches: weakref.WeakSet[WeightCopies] = weakref.WeakSet()
_SAMPLES = 509
_WHOLE = 8192


@dataclasses.dataclass(eq=False)
class _Together:
    """Copies that were made in one go, and lead back to all their parameters.

    Once one of these has other memory, the others are made again too: torch.utils.swap_tensors
    lets the way back to what it swaps raise an error.
    """

    are_valid: bool = True


class WeightCopies:
    """Keeps ``parameter.to(dtype)``, differentiable, while the parameter is the same.

    The copy's way back to the parameter keeps no tensors but the loss scale, so one copy serves
    any number of forward and backward passes: all micro-batches of an accumulated step.

    A copy is made again when the parameter's version counter, memory, ``requires_grad`` or
    gradient mode differ, and after every step of any ``torch.optim`` optimizer. Writes through
    ``parameter.data`` move none of these by themselves; on the CPU elements are compared as well
    (all of a small parameter, some hundreds of a large one), and :meth:`clear` is there for a
    write to a few elements of a large one. On other devices, where such a comparison
    would wait for the device, a copy lives for one forward pass only.
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.dtype], tuple[Any, ...]] = {}
        self.masters = False  # while true, the parameters themselves are given out
        _caches.add(self)

    def get(
        self, parameter: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The parameter in ``dtype``; gradients of the result reach the parameter.

        With a loss scale, they arrive multiplied by it, and leave divided by it: the copy belongs
        to the forward passes that use this very tensor.
        """
        return self.get_all([parameter], dtype, scale)[0]

    def get_all(
        self,
        parameters: Sequence[torch.Tensor],
        dtype: torch.dtype,
        scale: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """As :meth:`get`, of each; what is to be made is made in one go.

        In the dtype that they have, they are the parameters themselves, behind a border for their
        scaled gradients, which costs less to make than to look up.
        """
        if self.masters:
            return list(parameters)
        are_kept = parameters[0].dtype is not dtype and all([p.is_cpu for p in parameters])
        if torch.is_inference_mode_enabled() or not are_kept:
            return copy_all(parameters, dtype, scale)
        # Not read from the table at the end: another thread's optimizer may have emptied it.
        found = {id(p): self._kept(p, dtype, scale) for p in parameters}
        if any([copy is None for copy in found.values()]):
            # Once more, without those that were made together with one that was swapped.
            found = {id(p): self._kept(p, dtype, scale) for p in parameters}
            stale = {id(p): p for p in parameters if found[id(p)] is None}
            made = copy_all([*stale.values()], dtype, scale)
            together = _Together()
            for p, copy in zip(stale.values(), made, strict=True):
                self._copies[id(p), dtype] = (p, _state(p), copy, scale, together)
                found[id(p)] = copy
        return [found[id(p)] for p in parameters]

    def _kept(self, parameter: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> Any:
        """The copy from before, or None if the parameter is another now."""
        kept = self._copies.get((id(parameter), dtype))
        if kept is None or not kept[4].are_valid:
            return None
        if (
            kept[0] is parameter
            and kept[1] == _state(parameter)
            and kept[3] is scale
            and torch.equal(_sample(parameter).to(dtype), _sample(kept[2]))
        ):
            return kept[2]
        kept[4].are_valid = kept[0].data_ptr() == kept[1][1]
        return None

    def clear(self) -> None:
        """Forget every copy."""
        self._copies.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCopies:
        return WeightCopies()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return WeightCopies, ()


def is_trainable_leaf(value: Any) -> bool:
    """Whether torch.autocast would keep one 16-bit copy of this tensor for its whole region.

    The condition is cached_cast's in aten/src/ATen/autocast_mode.cpp.
    """
    return (
        isinstance(value, torch.Tensor)
        and value.requires_grad
        and value.is_leaf
        and not value._is_view()
    )


def _state(parameter: torch.Tensor) -> tuple[Any, ...]:
    return (
        parameter._version,
        parameter.data_ptr(),
        parameter.requires_grad,
        torch.is_grad_enabled(),
    )


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """All of a small parameter; of a large one, elements of every row and column, as a view."""
    value, count = parameter.detach(), parameter.numel()
    if count <= _WHOLE or not _is_dense(value):
        return value
    # An odd step walks through the columns of rows whose length is a power of two.
    return value.as_strided((count,), (1,))[:: (count // _SAMPLES) | 1]


def _is_dense(value: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _forget_all(*_: Any) -> None:
    for cache in list(_caches):
        cache.clear()


register_optimizer_step_post_hook(_forget_all)
