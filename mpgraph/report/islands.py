"""Where a graph goes back to float32 between 16-bit nodes, and why."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from mpgraph import ir
from mpgraph.op_table import MOVES_DATA
from mpgraph.report.records import SIXTEEN_BIT, Island, Node

_DEPTH = 2


def block_of(module: str) -> str:
    """The part of a model that a module is counted to: up to its first number, or two names.

    ``blocks.0`` for ``blocks.0.mlp.fc1``; ``encoder.norm`` for ``encoder.norm.scale``.
    """
    segments = module.split(".")
    for index, segment in enumerate(segments):
        if segment.isdigit():
            return ".".join(segments[: index + 1])
    return ".".join(segments[:_DEPTH])


def pattern_of(path: str) -> str:
    """A path with its numbers left open: ``blocks.*.mlp`` for ``blocks.3.mlp``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def range_text(paths: Sequence[str]) -> str:
    """``blocks.1 … blocks.11`` for a run of blocks; the model's own nodes are "model itself"."""
    names = [path or "model itself" for path in paths]
    return ", ".join(names) if len(names) < 3 else f"{names[0]} … {names[-1]}"


def find_islands(gm: fx.GraphModule, records: Mapping[str, Node]) -> Iterator[Island]:
    """Connected float32 nodes with a 16-bit value on both sides, one island per block.

    Residual connections in float32 join all blocks of a model. An island therefore ends where
    its block ends, but whether it lies between 16-bit nodes is asked of the whole. A block that
    itself neither reads nor feeds 16-bit nodes is left out, and so is one of views alone.
    """
    for group in _groups(gm.graph, records):
        names = {node.name for node in group}
        if _reads_16_bit(group, records) and _feeds_16_bit(group, names, records):
            for block, part in _by_block(group, records).items():
                members = [records[node.name] for node in part]
                touches = _reads_16_bit(part, records) or _feeds_16_bit(part, names, records)
                if touches and any(map(_computes, members)):
                    yield _island(block, members)


def _groups(graph: fx.Graph, records: Mapping[str, Node]) -> list[list[fx.Node]]:
    """Float32 nodes joined by the values that they pass on, in order of their first node."""
    leader: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    for node in graph.nodes:
        if not _is_wide(node, records):
            continue
        leader[node] = node
        for source in _producers(node):
            if source in leader:
                leader[find(node)] = find(source)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in leader:
        groups.setdefault(find(node), []).append(node)
    return list(groups.values())


def _is_wide(node: fx.Node, records: Mapping[str, Node]) -> bool:
    record = records.get(node.name)
    return record is not None and record.cast is None and record.runs_in == "fp32"


def _producers(node: fx.Node) -> Iterator[fx.Node]:
    """The operators that a node reads, through ``getitem``."""
    for source in node.all_input_nodes:
        yield from source.all_input_nodes if ir.is_getitem(source) else (source,)


def _consumers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield from user.users if ir.is_getitem(user) else (user,)


def _reads_16_bit(group: Sequence[fx.Node], records: Mapping[str, Node]) -> bool:
    return any(
        SIXTEEN_BIT.intersection(record.takes if record.cast else record.gives)
        for node in group
        for source in _producers(node)
        if (record := records.get(source.name)) is not None
        and not (record.cast and record.cast.kind == "weight")
    )


def _feeds_16_bit(group: Sequence[fx.Node], names: set[str], records: Mapping[str, Node]) -> bool:
    return any(
        record.runs_in in SIXTEEN_BIT
        for node in group
        for user in _consumers(node)
        if user.name not in names and (record := records.get(user.name)) is not None
    )


def _by_block(group: Sequence[fx.Node], records: Mapping[str, Node]) -> dict[str, list[fx.Node]]:
    blocks: dict[str, list[fx.Node]] = {}
    for node in group:
        blocks.setdefault(block_of(records[node.name].module), []).append(node)
    return blocks


def _island(block: str, members: Sequence[Node]) -> Island:
    reasons = (m.reason for m in members if m.rule == "widen" or "autocast" in m.region)
    return Island(
        block=block,
        nodes=tuple(m.name for m in members),
        operators=tuple(m.operator for m in members if _computes(m)),
        why=tuple(dict.fromkeys(reasons)) or ("float32 arrives, and nothing lowers it",),
    )


def _computes(node: Node) -> bool:
    return node.operator not in MOVES_DATA


def fold_islands(islands: Sequence[Island]) -> Iterator[list[Island]]:
    """Runs of islands that differ in the number of their block alone."""

    def shape(island: Island) -> tuple[object, ...]:
        return pattern_of(island.block), island.operators, island.why

    for _, run in itertools.groupby(islands, key=shape):
        yield list(run)
