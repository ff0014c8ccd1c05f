"""What a row of the operator table is, and how rows are written down.

The table is data and imports no torch: operators are named by their text, as
``str(OpOverload)`` prints it (``"aten.softmax.int"``).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class Rule(enum.Enum):
    """What a policy does to the floating-point inputs of one operator.

    float64, integer and complex inputs are never cast.
    """

    LOWER = "lower"  # run in the policy's compute dtype
    WIDEN = "widen"  # run in float32
    PROMOTE = "promote"  # cast every input to the widest dtype among them
    FOLLOW = "follow"  # run in what arrives; torch promotes by itself
    KEEP = "keep"  # never cast: the dtype is part of what the call means
    REFUSE = "refuse"  # an error: unsafe in 16 bit, and torch.autocast bans it


@dataclass(frozen=True)
class OpRule:
    """One row: the rule, and the reason that ``explain`` prints.

    Attributes:
        rule: What happens to the operator's inputs.
        reason: Why, in a few words.
        set_dtype: Pass ``dtype=float32`` to the operator instead of casting its input. When
            the call already has a ``dtype``, it is left alone.
        append_dtype: Switch to the overload that takes a ``dtype``, with float32 as its last
            argument (``norm``).
        dtype: ``"fp16"`` for a LOWER that runs in it whatever the policy's compute dtype is.
    """

    rule: Rule
    reason: str
    set_dtype: bool = False
    append_dtype: bool = False
    dtype: str | None = None


Rows = Mapping[str, OpRule]


def rows(rule: Rule, reason: str, ops: str, **options: Any) -> dict[str, OpRule]:
    """Return one row per operator in ``ops``, e.g. ``"exp sum sum.dim_IntList"``.

    A name without an overload means ``aten.<name>.default``. ``options`` are those of ``OpRule``.
    """
    row = OpRule(rule, reason, **options)
    return {_full_name(op): row for op in ops.split()}


def table(*parts: Rows) -> dict[str, OpRule]:
    """Join ``parts`` to one table; an operator named twice is an error."""
    joined: dict[str, OpRule] = {}
    for part in parts:
        twice = sorted(joined.keys() & part.keys())
        if twice:
            raise ValueError(f"operators with two rows: {', '.join(twice)}")
        joined.update(part)
    return joined


def _full_name(op: str) -> str:
    name, _, overload = op.partition(".")
    return f"aten.{name}.{overload or 'default'}"
