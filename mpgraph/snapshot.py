"""What an optimizer's step may change, so that a step with a closure can be taken back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer


def evaluates_closure_first(optimizer: Optimizer) -> bool:
    """Whether a step calls its closure once, before it changes anything.

    So do torch's own optimizers, except LBFGS, which calls it at every point that it tries.
    """
    own = type(optimizer).__module__.startswith("torch.optim.")
    return own and not isinstance(optimizer, LBFGS)


class Snapshot:
    """Copies of an optimizer's parameters and state, made before a step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.values = [(p, p.detach().clone()) for p in parameters]
        memo: dict[int, Any] = {id(p): p for p in parameters}
        self.state = {key: copy.deepcopy(value, memo) for key, value in optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put parameters and state back."""
        for parameter, value in self.values:
            parameter.copy_(value)
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)
