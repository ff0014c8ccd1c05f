"""Which nodes of a report a selection names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from mpgraph.errors import PolicyError
from mpgraph.policy_glob import matches_op, module_glob, near_misses, op_names, with_parents
from mpgraph.report.records import Graph, Node

_MATCHES: dict[str, Callable[[str, Node], bool]] = {
    "module": lambda glob, node: module_glob(glob).fullmatch(node.module) is not None,
    "op": lambda glob, node: matches_op(glob, node.operator),
    "rule": lambda rule, node: node.rule == rule,
    "dtype": lambda dtype, node: node.runs_in == dtype,
}
_NAMES: dict[str, Callable[[Node], Iterable[str]]] = {
    "module": lambda node: with_parents(node.module),
    "op": lambda node: op_names(node.operator),
    "rule": lambda node: (node.rule,),
    "dtype": lambda node: (node.runs_in,),
}


def check_selection(model: str, graphs: Sequence[Graph], wanted: Mapping[str, str]) -> None:
    """Refuse a selector that names nothing, and name what comes close to it."""
    nodes = [node for graph in graphs for node in graph.nodes]
    for key, value in wanted.items():
        if not any(_MATCHES[key](value, node) for node in nodes):
            names = {name for node in nodes for name in _NAMES[key](node) if name}
            raise PolicyError(f"{model} has no {key} {value!r}{near_misses(value, names)}")


def select(graph: Graph, wanted: Mapping[str, str]) -> Graph:
    """The graph with the nodes that every selector matches."""
    nodes = tuple(
        node
        for node in graph.nodes
        if all(_MATCHES[key](value, node) for key, value in wanted.items())
    )
    names = {node.name for node in nodes}
    islands = tuple(island for island in graph.islands if names.intersection(island.nodes))
    return dataclasses.replace(graph, nodes=nodes, islands=islands)
