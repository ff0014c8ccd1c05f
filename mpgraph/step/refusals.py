"""What a captured step would pass over, noticed at every call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as every_optimizer

from mpgraph.errors import CaptureError

_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    every_optimizer._global_optimizer_pre_hooks,
    every_optimizer._global_optimizer_post_hooks,
)


def refuse_hooks(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], names: dict[int, str]
) -> None:
    """Refuse hooks on steps of the optimizer, and on gradients that have been added up.

    Raises:
        CaptureError: There is one; says what to do instead.
    """
    if any(getattr(optimizer, name, None) for name in _STEP_HOOKS):
        raise CaptureError(
            "the optimizer has step hooks, which a captured step would not call. Remove them "
            "(their handle has .remove()) and do their work around the call of the step."
        )
    for hook in (hook for table in _GLOBAL_HOOKS for hook in table.values()):
        if not _is_own(hook):
            raise CaptureError(
                f"there is a hook on the steps of every optimizer ({_name(hook)}), which a "
                "captured step would not call. Remove it (its handle has .remove()) and do its "
                "work around the call of the step."
            )
    for parameter in [p for p in parameters if p.requires_grad and p._post_accumulate_grad_hooks]:
        raise CaptureError(
            f"parameter {names[id(parameter)]} has a post-accumulate-grad hook; TrainStep computes "
            "gradients without accumulating them. Remove it, or train with mpgraph.convert "
            "and mpgraph.guard."
        )


def _is_own(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "mpgraph"


def _name(hook: Any) -> str:
    return str(getattr(inspect.unwrap(hook), "__qualname__", type(hook).__name__))


def refuse_lost_gradients(
    leaves: Sequence[torch.Tensor], names: dict[int, str], say: Callable[[str], None]
) -> None:
    """Refuse a batch through which gradients would have to reach something outside of the step.

    Raises:
        CaptureError: A tensor of the batch is a parameter, or computed from some.
    """
    for leaf in leaves:
        if not leaf.requires_grad:
            continue
        if id(leaf) in names:
            raise CaptureError(
                f"the batch holds parameter {names[id(leaf)]}, whose gradient would miss what the "
                "loss computes from it there. Let the loss function read it from the model."
            )
        if not leaf.is_leaf:
            raise CaptureError(
                "a tensor of the batch was computed from others that require gradients "
                f"({leaf.grad_fn.name() if leaf.grad_fn else ''}), which a step would not reach. "
                "Compute it inside the loss function, or detach it."
            )
        say(
            "a tensor of the batch requires gradients. TrainStep computes those of the optimizer's "
            "parameters alone, so its .grad stays as it is."
        )


def refuse_inference_mode() -> None:
    """Refuse a step in inference mode.

    Raises:
        CaptureError: ``torch.inference_mode`` is on.
    """
    if torch.is_inference_mode_enabled():
        raise CaptureError(
            "the step is called inside torch.inference_mode(), where there are no gradients. Call "
            "it outside."
        )


def refuse_sparse(gradients: dict[str, Any]) -> None:
    """Refuse sparse gradients, for which clipping, the finite check and updates have other code.

    Raises:
        CaptureError: One of these fake gradients is sparse.
    """
    for name, value in gradients.items():
        if value.layout is not torch.strided:
            raise CaptureError(
                f"the gradient of {name} is sparse, and TrainStep takes dense ones. Make the "
                "embedding with sparse=False, or train with mpgraph.convert and mpgraph.guard."
            )
