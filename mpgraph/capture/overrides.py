"""Overrides of the policy that match nothing in what was captured."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from torch import fx

from mpgraph import ir
from mpgraph.errors import PolicyError
from mpgraph.module import State


def called(graphs: Iterable[fx.GraphModule]) -> Iterator[tuple[str, str, str]]:
    """``(operator, module path, node name)`` of every call, as a policy selects them."""
    return (
        (ir.operator_name(node), ir.module_path(node), node.name)
        for gm in graphs
        for node in gm.graph.nodes
        if node.op == "call_function"
    )


def say_what_matched_nothing(
    state: State, graphs: Iterable[fx.GraphModule], modules: Collection[str], where: str
) -> None:
    """Warn of it, where a part of the model that has not run yet may still match."""
    try:
        state.settings.policy.check_overrides(called(graphs), modules)
    except PolicyError as error:
        state.say(f"{where}, {error}")
