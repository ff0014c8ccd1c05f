"""Which 16-bit copies of parameters a graph takes are made together, and which scaled aliases."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Iterator

import torch
from torch import fx

from mpgraph.capture.captured import Slot
from mpgraph.pipeline import element_count

# How many copies are made together at most; 1 makes each by itself. Gradients wait in 16 bit for
# those of their group, which takes memory, and lets them reach DDP's buckets later: a group of more
# than a few has no more bytes of gradients than such a bucket holds (25 MiB, in fp32).
GROUP = 256
FEW = 16
BYTES_OF_MANY = 8 << 20
# The same for parameters in their own dtype, whose gradients are there anyway.
GROUP_OF_ALIASES = 64


def weight_groups(gm: fx.GraphModule) -> list[list[int]]:
    """The positions, among the placeholders, of copies to make together; every copy is in one list.

    Neighbours in order of use, of one dtype. Gradients of a group come in together, so all of it
    must reach the same outputs: otherwise the gradient of one output, taken with respect to its own
    head, would go through the trunk, and free its tensors. A parameter that the graph takes in
    another form too is by itself, so that its gradients add up in the same order as before.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    slots: list[Slot] = [node.meta["slot"] for node in placeholders]
    forms = collections.Counter((slot.target, slot.index) for slot in slots)
    first, reached = _uses(gm.graph)
    copies = [i for i, slot in enumerate(slots) if slot.dtype is not None]
    copies.sort(key=lambda i: first.get(placeholders[i], len(first)))
    alike: dict[Hashable, list[int]] = {}
    for i in copies:
        slot = slots[i]
        alone = i if forms[slot.target, slot.index] > 1 else None
        key = (slot.dtype, slot.scaled, reached.get(placeholders[i], 0), alone)
        alike.setdefault(key, []).append(i)
    return [group for same in alike.values() for group in _cut(same, placeholders)]


def _cut(same: list[int], placeholders: list[fx.Node]) -> Iterator[list[int]]:
    is_copy = placeholders[same[0]].meta["slot"].kind == "cast"
    most, group, held = GROUP if is_copy else GROUP_OF_ALIASES, list[int](), 0
    for i in same:
        size = _bytes(placeholders[i].meta["val"]) if is_copy else 0
        if len(group) >= most or (len(group) >= FEW and held + size > BYTES_OF_MANY):
            yield group
            group, held = [], 0
        group.append(i)
        held += size
    yield group


def _bytes(value: torch.Tensor) -> int:
    return element_count(value) * value.element_size()


def _uses(graph: fx.Graph) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
    """Where each value is used first, and the outputs that its gradient may come from, as bits."""
    first: dict[fx.Node, int] = {}
    reached: dict[fx.Node, int] = collections.defaultdict(int)
    nodes = list(graph.nodes)
    for position, node in reversed(list(enumerate(nodes))):
        for source in node.all_input_nodes:
            first[source] = position
            if node.target is not torch.ops.aten.detach.default:
                reached[source] |= reached[node]
        if node.op == "output":
            for bit, result in enumerate(node.all_input_nodes):
                reached[result] |= 1 << bit
    return first, dict(reached)
