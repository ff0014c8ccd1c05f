"""Notice an fp16 model that is trained without a guard, and say so once."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpgraph.grad_scaler import refuse_grad_scaler
from mpgraph.module import MixedPrecision, state_of

_unguarded: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def watch(model: nn.Module) -> None:
    """Look out for steps over this model's parameters, until it is guarded."""
    _unguarded.add(model)


def shares_parameters(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether the optimizer holds a parameter of the model."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return any(id(p) in held for p in model.parameters())


def say_unguarded(optimizer: Optimizer, *_: Any) -> None:
    """Warn about each watched model that the optimizer is about to change, unguarded.

    A model counts once its converted forward has run with gradients: the original, which has the
    same parameters, may be trained in float32.

    Raises:
        PrecisionError: A ``torch.amp.GradScaler`` steps it.
    """
    for model in list(_unguarded):
        if not isinstance(model, MixedPrecision) or state_of(model).scale.is_guarded:
            _unguarded.discard(model)
        elif state_of(model).scale.was_read and shares_parameters(optimizer, model):
            refuse_grad_scaler("steps the optimizer of an fp16 model, which scales by itself")
            _unguarded.discard(model)
            state_of(model).say(
                f"{type(model).__name__} trains in fp16 without a guard: a gradient that "
                "overflows goes into its parameters, and the loss scale never moves. After making "
                "the optimizer, call mpgraph.guard(optimizer, model)."
            )


register_optimizer_step_pre_hook(say_unguarded)
