"""Numbers that a loss function takes out of tensors: a captured step has them written into it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

TAKING = frozenset(
    {
        torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__,
        torch.Tensor.__complex__, torch.Tensor.__index__,
    }
)  # fmt: skip
"""Functions that take one out. Those that take more cannot be traced, and are refused."""


class TakenNumbers:
    """A number for what some tensors hold now: that of the graphs captured with the same.

    It is asked before every step. Of a tensor on a GPU, that waits for the GPU, as the loss
    function itself would.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, torch.Tensor] = {}
        self._known: dict[tuple[bytes, ...], int] = {(): 0}
        self._count = 1

    def number(self) -> int:
        """The number of what is there now; a new one if nothing was captured with it."""
        found = tuple([_bits(tensor) for tensor in self._tensors.values()])
        if found not in self._known:
            self._known[found] = self._count
            self._count += 1
        return self._known[found]

    def note(self, tensors: Iterable[torch.Tensor]) -> None:
        """A graph has just been captured that has the numbers of these tensors in it."""
        new = {id(tensor): tensor for tensor in tensors if id(tensor) not in self._tensors}
        if not new:
            return
        current = self.number()
        self._tensors |= new
        # Graphs captured with other numbers did not look at these tensors.
        self._known = {tuple([_bits(tensor) for tensor in self._tensors.values()]): current}


def _bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().reshape(-1).contiguous()
    return flat.view(torch.uint8).cpu().numpy().tobytes()
