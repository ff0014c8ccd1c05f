"""From a step that went wrong back to the first value that did."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from torch import fx

from mpgraph import ir
from mpgraph.ranges.records import Spread
from mpgraph.ranges.replay import Trace
from mpgraph.ranges.watch import Run

Spot = tuple[Run, fx.Node]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where it began.

    Attributes:
        side: "forward" or "backward".
        run: In which run of which graph.
        node: At which node.
        trail: Every value between it and the result, itself included, that went wrong with it.
    """

    side: str
    run: Run
    node: fx.Node
    trail: tuple[Spot, ...]


def find_origin(trace: Trace, true: Trace | None) -> Origin | None:
    """The first value of a step from which its non-finite results come.

    A value counts as wrong where more of it is infinite or NaN than in fp32: masks are made of
    -inf, and a mask of -1e9 that fp16 makes -inf does no harm. So the search goes backwards, from
    what came out wrong through wrong values alone.
    """
    forward = _Side("forward", trace, true)
    if trace.bad_loss or not trace.has_backward:
        return forward.search(forward.results(), forward.before)
    backward = _Side("backward", trace, true)
    found = backward.search(backward.leaves(), backward.after)
    if found is None:
        return None
    return _by_its_value(found, forward) or found


def _by_its_value(found: Origin, forward: _Side) -> Origin | None:
    """A gradient of NaN, without an infinite one before it, comes from an infinite value."""
    if found.run.gradient[found.node].infinite:
        return None
    near = [found.node, *found.node.users]
    near += [source for user in found.node.users for source in user.all_input_nodes]
    return forward.search([(found.run, node) for node in near], forward.before)


class _Side:
    """One direction of a step: which of its values are wrong, and what comes before what."""

    def __init__(self, side: str, trace: Trace, true: Trace | None) -> None:
        self.side, self.runs = side, trace.runs
        self.is_forward = side == "forward"
        self.wrong: set[Spot] = set()
        for index, run in enumerate(trace.runs):
            known = true.runs[index] if true is not None and index < len(true.runs) else None
            self.wrong.update((run, node) for node in self._wrong_in(run, known))

    def _wrong_in(self, run: Run, known: Run | None) -> Iterator[fx.Node]:
        expected = self.ranges(known) if known is not None else {}
        for node, spread in self.ranges(run).items():
            before = expected.get(node)
            if spread.bad > (before.bad if before is not None else 0):
                yield node

    def ranges(self, run: Run) -> dict[fx.Node, Spread]:
        """The ranges of this direction."""
        return run.forward if self.is_forward else run.gradient

    def search(
        self, starts: Iterable[Spot], earlier: Callable[[Spot], Iterable[Spot]]
    ) -> Origin | None:
        """The first wrong spot that wrong spots connect with one of the starts."""
        waiting, seen = list(starts), set[Spot]()
        while waiting:
            spot = waiting.pop()
            if spot not in seen and self._leads_on(spot):
                seen.add(spot)
                waiting.extend(earlier(spot))
        trail = sorted((s for s in seen if s in self.wrong), key=self._time)
        return Origin(self.side, *trail[0], tuple(trail)) if trail else None

    def _leads_on(self, spot: Spot) -> bool:
        """Whether a spot is wrong, or one of which nothing is known: several values in one."""
        run, node = spot
        unknown = node not in run.forward and isinstance(node.meta.get("val"), (tuple, list))
        return spot in self.wrong or unknown or node.op == "output"

    def _time(self, spot: Spot) -> int:
        run, node = spot
        return run.order["forward" if self.is_forward else "gradient", node]

    def results(self) -> list[Spot]:
        """What the graphs return. Between graphs nothing is known: all of it may matter."""
        return [(run, _output(run)) for run in self.runs if run.parent is None]

    def leaves(self) -> list[Spot]:
        """What the graphs are given."""
        inputs = ((run, run.graph_module.graph.find_nodes(op="placeholder")) for run in self.runs)
        return [(run, node) for run, nodes in inputs for node in nodes if run.parent is None]

    def before(self, spot: Spot) -> Iterator[Spot]:
        """What a value is computed from."""
        run, node = spot
        if node in run.inner:
            yield run.inner[node], _output(run.inner[node])
        if node.op == "placeholder" and run.parent is not None:
            outer, call = run.parent
            yield from ((outer, source) for source in call.all_input_nodes)
        yield from ((run, source) for source in node.all_input_nodes)

    def after(self, spot: Spot) -> Iterator[Spot]:
        """What a gradient is computed from: those of the values that read this one."""
        run, node = spot
        for user in node.users:
            if user in run.inner:
                inner = run.inner[user]
                inputs = inner.graph_module.graph.find_nodes(op="placeholder")
                yield from ((inner, value) for value in inputs)
            yield run, user
        if node.op == "output" and run.parent is not None:
            outer, call = run.parent
            yield from ((outer, user) for user in call.users)


def _output(run: Run) -> fx.Node:
    return run.graph_module.graph.output_node()


def given_wrong(trace: Trace) -> Iterator[Spot]:
    """Inputs and parameters that are infinite or NaN before anything is computed."""
    for run in trace.runs:
        for node in run.graph_module.graph.find_nodes(op="placeholder"):
            slot = node.meta.get("slot")
            known = getattr(slot, "kind", "") in ("input", "parameter", "cast")
            spread = run.forward.get(node)
            if run.parent is None and known and spread is not None and spread.bad:
                yield run, node


def is_half(node: fx.Node) -> bool:
    """Whether a node has 16 bits when its graph runs as it is."""
    dtype = ir.dtype_of(node)
    return dtype is not None and dtype.is_floating_point and dtype.itemsize == 2
