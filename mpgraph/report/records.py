"""What a report holds: plain records of text and numbers, which JSON can carry.

Nothing here refers to a graph or to torch, so reports of two processes, two versions of a model
or two versions of torch can be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

SIXTEEN_BIT = frozenset({"bf16", "fp16"})
UNKNOWN_SOURCE = "no row"  # how the source of a choice starts for an operator without a row

CastKind = Literal["inserted", "model", "weight"]


@dataclasses.dataclass(frozen=True)
class Cast:
    """What a cast does.

    Attributes:
        kind: "inserted" by mpgraph, written in the "model" itself, or of a "weight": made once
            per change of the parameter, not once per call.
        value: The node, or the parameter's path, that is cast.
        source: The dtype before.
        target: The dtype after.
        bytes: Bytes read and written, at the sizes of the captured call.
        readers: The nodes that use the result.
    """

    kind: CastKind
    value: str
    source: str
    target: str
    bytes: int
    readers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Node:
    """One operator of a graph.

    Attributes:
        name: Its name in the graph, as a policy's ``node=`` selects it.
        operator: Its operator, ``aten.softmax.int``.
        module: The dotted path of the module that it comes from; "" for the model itself.
        takes: The dtypes of its tensor inputs, in order.
        gives: The dtypes of its results.
        runs_in: The floating dtype that it computes in; "" where nothing floats.
        rule: "lower", "widen", "promote", "follow" or "keep"; "" where no rule was applied.
        reason: Why, in words.
        source: Where the rule comes from: a preset, an override, or no row.
        line: ``file.py:12: code`` of the user's line.
        region: The model's own region around it: "autocast off", "no_grad", …; "" for none.
        body: The sub-graph that it is in (a branch of ``cond``); "" for the graph itself.
        cast: What it casts, if it is a cast.
    """

    name: str
    operator: str
    module: str = ""
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    runs_in: str = ""
    rule: str = ""
    reason: str = ""
    source: str = ""
    line: str = ""
    region: str = ""
    body: str = ""
    cast: Cast | None = None

    @property
    def is_added(self) -> bool:
        """Whether mpgraph put the node there: a cast that the model does not have."""
        return self.cast is not None and self.cast.kind != "model"

    @property
    def is_unknown(self) -> bool:
        """Whether the operator table has no row for it."""
        return self.source.startswith(UNKNOWN_SOURCE)


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one pass did: edits, and the casts left in the graph after it."""

    name: str
    numerics: str
    edits: int
    casts: int
    cast_bytes: int


@dataclasses.dataclass(frozen=True)
class Island:
    """Connected nodes that run in float32 between 16-bit ones, as far as one block holds them.

    Attributes:
        block: The part of the model that these nodes belong to (``blocks.0``).
        nodes: Their names.
        operators: Their operators, views left out, in order.
        why: The reasons of those among them that a rule sends to float32.
    """

    block: str
    nodes: tuple[str, ...]
    operators: tuple[str, ...]
    why: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Break:
    """A place where the graph ends and Python takes over."""

    reason: str
    line: str = ""


@dataclasses.dataclass(frozen=True)
class Graph:
    """One captured graph of a model.

    Attributes:
        label: The kind of call that it is for: mode and argument shapes.
        engine: What captured it: "export" or "dynamo"; "" if unknown.
        reason: Why the engine that was asked first did not capture it; "" if it did.
        seconds: How long the capture took; 0.0 if unknown.
        dynamic: The input sizes that may vary: ``idx[0]``.
        passes: What each pass did, in order.
        nodes: Operators and casts, in the order in which they run.
        islands: Where it goes back to float32 between 16-bit nodes.
        breaks: Where the call leaves the graph.
    """

    label: str = ""
    engine: str = ""
    reason: str = ""
    seconds: float = 0.0
    dynamic: tuple[str, ...] = ()
    passes: tuple[Pass, ...] = ()
    nodes: tuple[Node, ...] = ()
    islands: tuple[Island, ...] = ()
    breaks: tuple[Break, ...] = ()

    @property
    def operators(self) -> tuple[Node, ...]:
        """The nodes that the model itself has."""
        return tuple(node for node in self.nodes if not node.is_added)

    @property
    def casts(self) -> tuple[Node, ...]:
        """The casts that run at every call: the model's own and the inserted ones."""
        return tuple(n for n in self.nodes if n.cast is not None and n.cast.kind != "weight")

    @property
    def weight_casts(self) -> tuple[Node, ...]:
        """The casts that run once per change of a parameter."""
        return tuple(n for n in self.nodes if n.cast is not None and n.cast.kind == "weight")

    @property
    def cast_bytes(self) -> int:
        """The bytes that the casts of one call read and write."""
        return sum_bytes(self.casts)


R = TypeVar("R", Node, Cast, Pass, Island, Break, Graph)

_NESTED: dict[str, type[Any]] = {
    "nodes": Node,
    "passes": Pass,
    "islands": Island,
    "breaks": Break,
    "cast": Cast,
}


def sum_bytes(nodes: tuple[Node, ...]) -> int:
    """The bytes that these casts read and write."""
    return sum(node.cast.bytes for node in nodes if node.cast is not None)


def to_plain(record: Any) -> dict[str, Any]:
    """A record as dictionaries, lists, text and numbers; defaults are left out."""
    fields = record.__dataclass_fields__
    return {k: _plain(value) for k, value in vars(record).items() if value != fields[k].default}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return to_plain(value) if dataclasses.is_dataclass(value) else value


def from_plain(cls: type[R], values: Mapping[str, Any]) -> R:
    """The inverse of :func:`to_plain`; keys of a later mpgraph are left out."""
    known = cls.__dataclass_fields__
    return cls(**{key: _record(key, value) for key, value in values.items() if key in known})


def _record(key: str, value: Any) -> Any:
    # An island's "nodes" are names, a graph's are nodes.
    if isinstance(value, list):
        return tuple(_record(key, item) for item in value)
    if isinstance(value, Mapping):
        return from_plain(_NESTED[key], value)
    return value
