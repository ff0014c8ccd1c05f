"""A row of the tables: an operator, its formula and where that comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload


@dataclasses.dataclass(frozen=True)
class Row:
    """How some operators are computed in terms of others.

    Attributes:
        targets: The operators.
        function: Takes what they take, and returns what they return.
        formula: What it computes, for people.
        source: Where the formula is written down, or why it holds.
    """

    targets: tuple[OpOverload, ...]
    function: Callable[..., Any]
    formula: str
    source: str
