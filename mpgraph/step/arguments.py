"""What a TrainStep is made of: its arguments, checked, and the parameters that it trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from mpgraph.conversion import convert
from mpgraph.errors import PolicyError, PrecisionError
from mpgraph.module import MixedPrecision, state_of
from mpgraph.plain import STATE


def check_arguments(
    model: Any,
    optimizer: Any,
    loss_fn: Any,
    accumulation_steps: Any,
    max_grad_norm: Any,
    chunk_loss_head: Any,
) -> None:
    """Refuse what a step cannot be made of.

    Raises:
        PrecisionError: Which argument, what was expected and found.
    """
    if not isinstance(optimizer, Optimizer):
        raise PrecisionError(
            "TrainStep takes the model, then the optimizer: expected a torch.optim.Optimizer, "
            f"found {type(optimizer).__name__}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise PrecisionError(
            "LBFGS evaluates the loss several times in one step, as often as its line search "
            "asks for, so there is no one graph of a step. Use mpgraph.convert and "
            "optimizer.step(closure)."
        )
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        if distributed.get_world_size() > 1:
            raise PrecisionError(
                "TrainStep does not add up gradients over several processes. Train with "
                "DistributedDataParallel(mpgraph.convert(model, ...)) and mpgraph.guard."
            )
    if loss_fn is not None and not callable(loss_fn):
        raise PrecisionError(
            f"loss_fn must be a function of the model and a batch, found {type(loss_fn).__name__}"
        )
    if not isinstance(accumulation_steps, int) or accumulation_steps < 1:
        raise PrecisionError(
            f"accumulation_steps must be an integer from 1, found {accumulation_steps!r}"
        )
    if chunk_loss_head is not None and (
        isinstance(chunk_loss_head, bool)
        or not isinstance(chunk_loss_head, int)
        or chunk_loss_head < 1
    ):
        raise PrecisionError(
            f"chunk_loss_head must be a number of rows from 1, such as 1024, "
            f"found {chunk_loss_head!r}"
        )
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise PrecisionError(f"max_grad_norm must be positive, found {max_grad_norm}")


def converted(model: Any, precision: Any, policy: Any) -> nn.Module:
    """The model itself, if it is converted and no other precision is asked for."""
    is_converted = isinstance(model, MixedPrecision) and STATE in vars(model)
    if is_converted and precision is None:
        if policy != "default":
            raise PolicyError(
                f"the model is converted already, with the policy {state_of(model).settings.policy}"
                "; TrainStep's policy is for a plain model. Pass it to mpgraph.convert, or pass "
                "precision too, which converts the model anew."
            )
        return cast(nn.Module, model)
    precision = "auto" if precision is None else precision
    return cast(nn.Module, convert(model, precision, policy=policy))


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Every parameter of every group."""
    return (p for group in optimizer.param_groups for p in group["params"])


def trained_by(optimizer: Optimizer, names: dict[int, str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Those that require gradients, with their names."""
    return ((names[id(p)], p) for p in parameters_of(optimizer) if p.requires_grad)


def parameter_names(model: nn.Module, optimizer: Optimizer) -> dict[int, str]:
    """By identity, the name of each of the optimizer's parameters."""
    known = {id(p): name for name, p in model.named_parameters()}
    names = {}
    for index, parameter in enumerate(parameters_of(optimizer)):
        names[id(parameter)] = known.get(id(parameter), f"parameter {index} of the optimizer")
    if names and not any(key in known for key in names):
        raise PrecisionError(
            f"the optimizer holds none of the parameters of {type(model).__name__}. Make it from "
            "the model's parameters: torch.optim.AdamW(model.parameters(), ...)"
        )
    return names
