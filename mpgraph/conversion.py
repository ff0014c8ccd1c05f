"""The way in: a model becomes a model of the same class that trains in mixed precision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

from mpgraph import ir
from mpgraph.errors import PolicyError, PrecisionError
from mpgraph.module import (
    MixedPrecision,
    Settings,
    State,
    converted_class,
    state_of,
)
from mpgraph.plain import STATE
from mpgraph.policy import Policy
from mpgraph.precision import Precision, allow_tf32, resolve_precision
from mpgraph.tree_copy import copy_tree
from mpgraph.uncompiled import is_compiled
from mpgraph.warn import warn

M = TypeVar("M", bound=nn.Module)
CAPTURES = ("auto", "export", "dynamo")


def convert(
    model: M | torch.export.ExportedProgram,
    precision: str | torch.dtype = "auto",
    *,
    policy: Policy | str | Mapping[str, Any] | os.PathLike[str] = "default",
    example_inputs: tuple[Any, ...] | dict[str, Any] | None = None,
    capture: str = "auto",
    inplace: bool = False,
    masters: str | None = None,
    max_graphs: int = 64,
) -> M:
    """Return ``model`` in mixed precision: same class, same parameters, same state_dict keys.

    Matrix products and convolutions run in 16 bit; reductions, softmax, norms and losses in
    float32; parameters, gradients and optimizer state stay float32. Which is which is decided
    once per kind of call, in a graph that :func:`mpgraph.explain` prints. The first call of a
    kind captures it. In fp16, gradients are scaled inside the model, so that small ones do not
    vanish; results leave in float32; and :func:`mpgraph.guard` belongs around the optimizer.

    Args:
        model: Any ``nn.Module``, an ``fx.GraphModule``, or a ``torch.export.ExportedProgram``.
            It is left as it was; the result shares its parameters and buffers.
        precision: "bf16", "fp16", "fp32", "tf32", "bf16-true", "fp16-true", "auto", or a dtype.
        policy: A preset's name, a :class:`mpgraph.Policy`, its one-line text, or a TOML file.
        example_inputs: Positional (tuple) or keyword (dict) arguments: capture at once.
        capture: "export" (one graph), "dynamo" (graph breaks allowed), or "auto": export, and
            Dynamo where export would not be faithful.
        inplace: Convert ``model`` itself and return it.
        masters: "create" makes float32 parameters from a 16-bit model's.
        max_graphs: The most kinds of call to capture before an error; where Dynamo splits a call
            into several graphs, eight times as many graphs.

    Raises:
        PrecisionError: The precision is unknown, or does not fit the model's parameters; or the
            model is already wrapped in DistributedDataParallel or its like, or is TorchScript.
        PolicyError: The policy cannot be read, or an override matches nothing.
        CaptureError: With ``example_inputs``: the call cannot be captured.

    Example:
        >>> import mpgraph, torch
        >>> model = mpgraph.convert(torch.nn.Linear(4, 2), "bf16")
        >>> model(torch.ones(3, 4)).dtype
        torch.bfloat16
    """
    module = _as_module(model)
    _refuse_wrapped(module)
    device = _device_of(module)
    resolved = resolve_precision(precision, device)
    settings = Settings(resolved, Policy.coerce(policy), _known(capture), device, max_graphs)
    _check_parameters(module, resolved, masters)
    _refuse_torchscript(module, changes=resolved.pure or masters == "create")
    if resolved.tf32:
        allow_tf32()
    if not inplace and any(is_compiled(part) for part in module.modules()):
        warn(
            "the model was compiled by its compile() method; what convert returns is a copy, which "
            "is not compiled. Call compile() on that, or pass inplace=True."
        )
    result = module if inplace else copy_tree(module)
    _change_parameters(result, resolved, masters)
    _change_class(result, settings)
    if example_inputs is not None:
        _capture(result, example_inputs)
    return cast(M, result)


def _as_module(model: Any) -> nn.Module:
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if isinstance(model, nn.Module):
        return model
    raise PrecisionError(
        f"expected an nn.Module, an fx.GraphModule or an ExportedProgram, found "
        f"{type(model).__name__}. Wrap a plain function in an nn.Module whose forward calls it."
    )


def _known(capture: str) -> str:
    if capture not in CAPTURES:
        raise PolicyError(f"unknown capture engine {capture!r}; use one of {', '.join(CAPTURES)}")
    return capture


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def _refuse_wrapped(model: nn.Module) -> None:
    """A wrapper's own Python runs at every call; in a graph it would run once, at capture."""
    for path, module in model.named_modules():
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
                where = f" at {path!r}" if path else ""
                raise PrecisionError(
                    f"the model is already wrapped in {base.__name__}{where}. Convert first, then "
                    f"wrap: {base.__name__}(mpgraph.convert(model, ...))."
                )


def _refuse_torchscript(model: nn.Module, changes: bool) -> None:
    """TorchScript has no class to convert; its parameters are the runtime's, not to be replaced."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and (changes or not path):
            where = f" at {path!r}" if path else ""
            raise PrecisionError(
                f"found a TorchScript module{where}, whose code and parameters belong to its own "
                "runtime. Convert the model before torch.jit.script or torch.jit.trace makes one "
                "of it: the plain nn.Module that it was made from."
            )


def _device_of(model: nn.Module) -> str:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "meta":
            raise PrecisionError(
                "the model is on the meta device, so it has no values to train. Give it storage "
                "first: model.to_empty(device=...) and load_state_dict, or from_pretrained."
            )
        return tensor.device.type
    return "cpu"


_HALF = (torch.bfloat16, torch.float16)


def _check_parameters(model: nn.Module, precision: Precision, masters: str | None) -> None:
    lazy = [n for n, p in model.named_parameters() if torch.nn.parameter.is_lazy(p)]
    if lazy:
        raise PrecisionError(
            f"parameters {', '.join(lazy[:4])} are not initialised yet (lazy modules). Call the "
            "model once, then convert it."
        )
    floating = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    if not floating:
        raise PrecisionError(
            f"{type(model).__name__} has no floating-point parameters: there is nothing to train "
            "in mixed precision. If its layers are created at the first call, call it once first."
        )
    if masters not in (None, "create"):
        raise PrecisionError(f"masters must be None or 'create', found {masters!r}")
    halves = [name for name, p in floating.items() if p.dtype in _HALF]
    if halves and masters is None and not precision.pure:
        raise PrecisionError(_no_masters(floating, halves, precision))


def _no_masters(floating: dict[str, Any], halves: list[str], precision: Precision) -> str:
    shown = ", ".join(f"{n} ({ir.short_name(floating[n].dtype)})" for n in halves[:4])
    more = f" and {len(halves) - 4} more" if len(halves) > 4 else ""
    return (
        f"{len(halves)} of {len(floating)} parameters are already 16-bit: {shown}{more}. There are "
        f"no float32 masters for {precision.name} training to update: small updates would be "
        "rounded away. Either load the model in float32 (from_pretrained(..., "
        "dtype=torch.float32)), or pass masters='create' to make float32 masters from the rounded "
        "weights, or ask for 'bf16-true' / 'fp16-true' to train in 16 bit throughout."
    )


def _change_parameters(model: nn.Module, precision: Precision, masters: str | None) -> None:
    if masters == "create" and not precision.pure:
        if any(p.dtype in _HALF for p in model.parameters()):
            warn(
                "float32 masters were made from 16-bit parameters; what rounding had already "
                "taken is lost. Load the model in float32 if you can. Create the optimizer after "
                "convert: these are new parameters."
            )
        _retype_parameters(model, torch.float32, _HALF)
    elif precision.pure:
        assert precision.compute is not None
        _retype_parameters(model, precision.compute, (torch.float32, *_HALF))


def _retype_parameters(
    model: nn.Module, dtype: torch.dtype, sources: tuple[torch.dtype, ...]
) -> None:
    made: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.dtype in sources and tensor.dtype is not dtype:
                    table[name] = made.setdefault(id(tensor), _retyped(tensor, dtype))


def _retyped(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    new = tensor.detach().to(dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new


def _change_class(model: nn.Module, settings: Settings) -> None:
    if isinstance(model, MixedPrecision) and STATE in vars(model):
        state = state_of(model).again(settings)
    elif isinstance(model, MixedPrecision):  # a slice of a converted Sequential
        state = State(settings, type(model).__bases__[1], vars(model).pop("forward", None))
    else:
        state = State(settings, type(model), vars(model).pop("forward", None))
    vars(model)[STATE] = state
    state.belongs_to(model)
    model.__class__ = converted_class(state.original)


def _capture(model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any]) -> None:
    state = state_of(model)
    if isinstance(example_inputs, Mapping):
        state.capture(model, (), dict(example_inputs))
    else:
        inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        state.capture(model, inputs, {})
