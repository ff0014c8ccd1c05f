"""What a capture engine yields: a flat graph, and what its inputs and outputs stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import fx

from mpgraph.capture.attribute_reads import Reads
from mpgraph.structure import Spec

SlotKind = Literal["parameter", "buffer", "attribute", "constant", "input", "cast", "scale"]


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one placeholder of the graph stands for.

    Attributes:
        kind: A parameter or buffer of the model, a tensor that is a plain attribute of one of its
            modules, a constant of the graph, an input leaf, the 16-bit copy of a parameter, or the
            loss scale.
        target: The dotted path in the model, the constant's name, or the input leaf's name.
        index: For an input: its position among the flattened arguments.
        dtype: For a 16-bit copy: its dtype. For a parameter with a scaled gradient: its own.
        scaled: Its gradient arrives multiplied by the loss scale, which the caller takes out.
    """

    kind: SlotKind
    target: str
    index: int = -1
    dtype: torch.dtype | None = None
    scaled: bool = False


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A tensor that the model's forward assigns to an attribute or buffer of a module."""

    module: str
    name: str
    is_buffer: bool
    spec: Spec


@dataclasses.dataclass
class Captured:
    """One call of a model as a graph.

    ``graph_module`` takes one value per placeholder, whose ``meta["slot"]`` says which, and
    returns a flat tuple: the leaves of the model's result, then those of every assignment. It
    holds as long as the attributes in ``reads`` are what they were; if there are ``moves``, a run
    changes what it is specialised to. Without ``reads_mode``, it would be the same in training and
    in evaluation.
    """

    graph_module: fx.GraphModule
    constants: dict[str, Any]
    output: Spec
    assignments: tuple[Assignment, ...]
    accepts: Callable[[Sequence[Any]], bool]
    seconds: float
    reads: Reads
    moves: set[str]
    reads_mode: bool


def slots_of(gm: fx.GraphModule) -> list[Slot]:
    """What the placeholders of a graph stand for, in order."""
    return [node.meta["slot"] for node in gm.graph.find_nodes(op="placeholder")]
