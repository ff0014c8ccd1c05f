"""The converted modules inside an ordinary model, or inside a wrapper around one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from mpgraph.errors import MPGraphError
from mpgraph.module import MixedPrecision, State, state_of

_MOST_SHOWN = 6


def converted_modules(model: Any, precision: str = "bf16") -> dict[str, nn.Module]:
    """The outermost converted modules by path, each once; "" is the model itself.

    Args:
        model: A converted module, or a model or wrapper (DistributedDataParallel, torch.compile)
            with converted modules in it.
        precision: What an error suggests to convert the model to.

    Raises:
        MPGraphError: There is none.
    """
    found = {id(module): (path, module) for path, module in _outermost("", model)}
    if not found:
        state_of(model, precision)  # says that nothing was converted, and what to do
    return dict(found.values())


def captured_state(model: Any) -> State:
    """The state of the one converted module in ``model``, some call of which was captured.

    Raises:
        MPGraphError: There is none, or more than one; or no call of it has been captured yet.
    """
    found = converted_modules(model)
    if len(found) > 1:
        raise MPGraphError(_several(model, list(found)))
    (module,) = found.values()
    state = state_of(module)
    if not state.specialisations():
        raise MPGraphError(
            f"{state.original.__name__} was converted, but no call of it has been captured yet, so "
            "there is nothing to show. Call it once, or pass example_inputs to mpgraph.convert."
        )
    return state


def _outermost(path: str, model: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, MixedPrecision):
        yield path, cast(nn.Module, model)
    elif isinstance(model, nn.Module):
        for name, child in model.named_children():
            yield from _outermost(f"{path}.{name}" if path else name, child)


def _several(model: Any, paths: list[str]) -> str:
    shown = ", ".join(map(repr, paths[:_MOST_SHOWN]))
    more = f" and {len(paths) - _MOST_SHOWN} more" if len(paths) > _MOST_SHOWN else ""
    return (
        f"{type(model).__name__} holds {len(paths)} converted modules: {shown}{more}. Pass one of "
        f"them: model.get_submodule({paths[0]!r})"
    )
