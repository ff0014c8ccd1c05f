"""What a range report holds: plain records of text and numbers. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

FP16_MAX = 65504.0
FP16_MIN_NORMAL = 2.0**-14
FP16_MIN_SUBNORMAL = 2.0**-24
# Half a step above the largest number: what is not below it becomes infinite.
FP16_OVERFLOWS = 65520.0
# Binary exponents: below the first one a value rounds to 0, below the second it loses digits.
_VANISHES, _SUBNORMAL = -25, -14

Kind = Literal["forward", "backward", "loss", "input", "parameter", "fp32", "between"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """The magnitudes among the values of one tensor.

    Attributes:
        count: How many values there are.
        zeros: How many of them are 0.
        infinite: How many are infinite.
        nan: How many are NaN.
        largest: The largest finite magnitude.
        exponents: Pairs ``(e, n)``: n magnitudes lie in ``[2**e, 2**(e + 1))``; () if not counted.
    """

    count: int
    zeros: int = 0
    infinite: int = 0
    nan: int = 0
    largest: float = 0.0
    exponents: tuple[tuple[int, int], ...] = ()

    @property
    def bad(self) -> int:
        """How many values are infinite or NaN."""
        return self.infinite + self.nan

    def overflows(self, scale: float = 1.0) -> bool:
        """Whether the largest value, times ``scale``, is infinite in fp16."""
        return self.largest * scale >= FP16_OVERFLOWS

    def vanishing(self, scale: float = 1.0) -> float:
        """The share of non-zero values that fp16 rounds to 0, times ``scale``."""
        return self._below(_VANISHES, scale)

    def subnormal(self, scale: float = 1.0) -> float:
        """The share of non-zero values that fp16 holds with fewer digits, times ``scale``."""
        return self._below(_SUBNORMAL, scale) - self._below(_VANISHES, scale)

    def lost(self, scale: float = 1.0) -> float:
        """The part of the sum of magnitudes that rounding to 0 takes away, times ``scale``."""
        parts = [(e, n * 2.0**e) for e, n in self.exponents]
        total = sum(part for _, part in parts)
        gone = sum(part for e, part in parts if e < _VANISHES - math.log2(scale))
        return gone / total if total else 0.0

    def quantile(self, part: float) -> float:
        """A magnitude below which about this part of the non-zero values lies; 0.0 if none is."""
        wanted = part * sum(n for _, n in self.exponents)
        for exponent, n in self.exponents:
            wanted -= n
            if wanted <= 0:
                return float(2.0**exponent)
        return self.largest

    def merged(self, other: Spread | None) -> Spread:
        """Both together."""
        if other is None:
            return self
        exponents = dict(self.exponents)
        for exponent, n in other.exponents:
            exponents[exponent] = exponents.get(exponent, 0) + n
        return Spread(
            self.count + other.count,
            self.zeros + other.zeros,
            self.infinite + other.infinite,
            self.nan + other.nan,
            max(self.largest, other.largest),
            tuple(sorted(exponents.items())),
        )

    def _below(self, exponent: int, scale: float) -> float:
        total = sum(n for _, n in self.exponents)
        small = sum(n for e, n in self.exponents if e < exponent - math.log2(scale))
        return small / total if total else 0.0


@dataclasses.dataclass(frozen=True)
class NodeRange:
    """The values of one node in one step.

    Attributes:
        name: Its name in the graph, as a policy's ``node=`` selects it.
        operator: Its operator; "" for what a graph is given.
        module: The dotted path of the module that it comes from.
        line: ``file.py:12: code`` of the user's line.
        dtype: The dtype of its values and of their gradient.
        graph: The number of the graph's run within the step, from 1.
        role: "operator", "cast", "weight", "parameter", "input" or "other".
        forward: Its values, as the step had them.
        gradient: Their gradient, as the step had it: times the loss scale where the dtype is fp16.
        true_forward: What they are in fp32; None if they could not be computed.
        true_gradient: What their gradient is in fp32, without a scale.
    """

    name: str
    operator: str = ""
    module: str = ""
    line: str = ""
    dtype: str = ""
    graph: int = 1
    role: str = "operator"
    forward: Spread | None = None
    gradient: Spread | None = None
    true_forward: Spread | None = None
    true_gradient: Spread | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """The first value that left the range, and what cures it.

    Attributes:
        kind: "forward" or "backward": a node, by its value or by its gradient; "loss": what is
            computed from the model's results; "input" or "parameter": it was given so;
            "fp32": fp32 cannot hold it either; "between": what Dynamo leaves to Python.
        name: The node.
        operator: Its operator.
        module: The path of its module.
        line: The user's line.
        dtype: Its dtype.
        source: For a cast: the module, or the name, of what it casts; where that has grown too
            large for fp16 on its way through fp32, of where it did.
        largest: The largest magnitude of its value (its true gradient), computed in fp32.
        bad: How many of its values are infinite or NaN.
        count: How many values it has.
        overrides: What to pin, each as a policy takes it: ``module=blocks.0.mlp run=fp32``.
        policy: The model's policy with these overrides, in one line: for ``mpgraph.convert``.
        scale: A loss scale that cures it; None if none does, or if a pin is the better cure.
        tried: Whether the step was finite with the cure; None if it was not tried.
    """

    kind: Kind
    name: str = ""
    operator: str = ""
    module: str = ""
    line: str = ""
    dtype: str = ""
    source: str = ""
    largest: float | None = None
    bad: int = 0
    count: int = 0
    overrides: tuple[str, ...] = ()
    policy: str = ""
    scale: float | None = None
    tried: bool | None = None


def node_from(values: Mapping[str, Any]) -> NodeRange:
    """The inverse of :func:`mpgraph.report.records.to_plain`."""
    return NodeRange(**_known(NodeRange, values))


def finding_from(values: Mapping[str, Any]) -> Finding:
    """The inverse of :func:`mpgraph.report.records.to_plain`."""
    return Finding(**_known(Finding, values))


def _known(record: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record among these values; keys of a later mpgraph are left out."""
    return {key: _value(values[key]) for key in record.__dataclass_fields__ if key in values}


def _value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Spread(**_known(Spread, value))
    return tuple(map(_value, value)) if isinstance(value, (list, tuple)) else value
