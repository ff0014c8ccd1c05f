"""What a user's loss function returns: the loss, and whatever else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mpgraph.errors import CaptureError

LossFunction = Callable[..., Any]


def models_own_loss(model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The loss that a model computes itself, as those of Hugging Face do when given labels."""
    result = model(*args, **kwargs)
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", result)
    if not isinstance(loss, torch.Tensor):
        raise CaptureError(
            f"TrainStep was given no loss_fn, so the model is to return its loss: a scalar, or an "
            f"object with .loss. {type(model).__name__} returned {_describe(result)}. Pass the "
            "labels (a Hugging Face model then computes its loss), or "
            "loss_fn=lambda model, x, y: ..."
        )
    return loss


def loss_of(result: Any, loss_fn: LossFunction) -> torch.Tensor:
    """The loss among what the loss function returned: all of it, the first, or ``.loss``."""
    loss = result
    if isinstance(result, Mapping):
        loss = result.get("loss")
    elif isinstance(result, (tuple, list)) and not hasattr(result, "loss"):
        loss = result[0] if result else None
    elif not isinstance(result, torch.Tensor):
        loss = getattr(result, "loss", None)
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    if not isinstance(loss, torch.Tensor):
        raise CaptureError(
            f"{name} returned {_describe(result)}, in which there is no loss. Return the loss, a "
            "tuple that starts with it, or a dict or object with 'loss'."
        )
    if loss.numel() != 1 or not loss.is_floating_point():
        raise CaptureError(
            f"{name} returned a loss of shape {list(loss.shape)} and dtype {loss.dtype}; expected "
            "one floating-point number. Reduce it: loss.mean()."
        )
    if not loss.requires_grad:
        raise CaptureError(
            f"the loss that {name} returned depends on no parameter that requires gradients, so "
            "there is nothing to train. Was it detached, or computed under torch.no_grad()?"
        )
    return loss


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(repr, value)) or 'nothing in it'}"
    return f"a {type(value).__name__}"


def needs_a_value(line: str) -> str:
    """What to say of a loss function that looks at a value, at this line of the user's."""
    where = f" at {line}" if line else ""
    return (
        f"the loss function needs the value of a tensor{where} (.item(), an if, a print or a "
        "conversion to a number). A step that is captured once has no values while it is traced. "
        "Compute with tensors instead (torch.where), and return what you want to print beside "
        "the loss."
    )


def needs_a_size(operator: object, line: str) -> str:
    """What to say of an operator whose result's size depends on values, at this line."""
    where = f" at {line}" if line else ""
    return (
        f"the size of what {operator} returns{where} depends on the values of tensors, and a step "
        "that is captured once has none while it is traced. Use an operator with a fixed size "
        "(torch.where, a mask), or an ordinary loop with mpgraph.convert and mpgraph.guard."
    )


def needs_fixed_sizes(said: str, line: str) -> str:
    """What to say of an operator that refuses a symbolic size, at this line of the user's."""
    where = f" at {line}" if line else ""
    return (
        f"the step cannot be captured for batches of every size: an operator{where} asks for the "
        f"numbers of sizes ({said}). Write that part in other operators, or fix the sizes: "
        "dynamic=False in TrainStep, dynamic_batch=False in export_onnx."
    )
