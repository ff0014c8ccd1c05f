"""The operator table: which dtype each operator runs in, and why.

The table is data. A preset maps an operator's text, as ``str(OpOverload)`` prints it, to its
row; ``rule_for`` looks one up. There is no default row: an operator that is missing is
reported, not guessed. Nothing here imports torch.

Presets:
    ``default``: the same on every device; reductions, softmax, norms and losses in float32.
    ``lean``: as ``default``, but norms, softmax and the residual stream stay in 16 bit, where
        the kernels compute in float32 anyway. Uses the least memory.
    ``autocast-cpu``, ``autocast-cuda``: torch.autocast's own lists.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from types import MappingProxyType

from mpgraph.op_rows_autocast import (
    AUTOCAST_CPU,
    AUTOCAST_CUDA,
    CUDA_RECURRENT,
    OPENED,
    SAFE_COMPOSITES_CPU,
    SAFE_COMPOSITES_CUDA,
    SINCE,
)
from mpgraph.op_rows_default import COMPOSITES, DEFAULT, LEAN
from mpgraph.op_rows_shared import MOVES_DATA, SHARED
from mpgraph.op_rule import OpRule, Rows, Rule

__all__ = [
    "MOVES_DATA",
    "PRESETS",
    "OpRule",
    "Rule",
    "keeps_dtype_by_name",
    "ops_with_rule",
    "rule_for",
]

_LEFT_ALONE = OpRule(Rule.FOLLOW, "not on torch.autocast's lists: runs in what arrives")
_WRITES_IN_PLACE = OpRule(Rule.KEEP, "writes into a tensor that already has a dtype")

_OUT_OVERLOADS = frozenset(
    "values dim_values values_stable dim_max dim_min grad_input output U Q X L a eigvals "
    "eigenvalues inverse result sign OutTensor OutScalar_Self OutScalar_Other".split()
)
_OR_AND_XOR_SHIFTS = frozenset(
    "__and__ __or__ __xor__ __lshift__ __rshift__".split()
)  # they end with an underscore, but write nothing


def _installed(listed: Rows) -> dict[str, OpRule]:
    """The rows that hold for the installed torch; asking for its version does not import it."""
    major, minor = importlib.metadata.version("torch").split(".")[:2]
    version = (int(major), int(minor))
    return {op: row for op, row in listed.items() if SINCE.get(op, version) <= version}


def _left_alone(listed: Rows, safe_composites: frozenset[str]) -> dict[str, OpRule]:
    """Rows for what ``default`` casts and torch.autocast does not.

    A composite operator gets one only if it is safe. The others are opened, because
    torch.autocast casts something inside them.
    """
    opened = (COMPOSITES | OPENED) - safe_composites - SINCE.keys()
    return {op: _LEFT_ALONE for op in DEFAULT if op not in listed and op not in opened}


PRESETS: Mapping[str, Mapping[str, OpRule]] = MappingProxyType(
    {
        name: MappingProxyType(preset)
        for name, preset in {
            "default": {**SHARED, **DEFAULT},
            "autocast-cpu": {
                **SHARED,
                **_left_alone(_installed(AUTOCAST_CPU), SAFE_COMPOSITES_CPU),
                **_installed(AUTOCAST_CPU),
            },
            "autocast-cuda": {
                **SHARED,
                **_left_alone(_installed(AUTOCAST_CUDA), SAFE_COMPOSITES_CUDA),
                **_installed(AUTOCAST_CUDA),
                **CUDA_RECURRENT,
            },
            "lean": {**SHARED, **DEFAULT, **LEAN},
        }.items()
    }
)
"""Preset name to its rows, both read-only."""


def rule_for(preset: str, op: str) -> OpRule | None:
    """Return the row of ``op`` in ``preset``, or None where there is no row.

    In-place and ``out=`` variants need no row: torch.autocast never casts for them, and
    neither does any preset.

    Args:
        preset: A key of ``PRESETS``.
        op: The operator's text, e.g. ``"aten.sum.dim_IntList"``.
    """
    row = PRESETS[preset].get(op)
    if row is None and keeps_dtype_by_name(op):
        return _WRITES_IN_PLACE
    return row


def ops_with_rule(preset: str, rule: Rule) -> frozenset[str]:
    """Return the operators whose row in ``preset`` has ``rule``."""
    return frozenset(op for op, row in PRESETS[preset].items() if row.rule is rule)


def keeps_dtype_by_name(op: str) -> bool:
    """Whether the name says that ``op`` writes into one of its arguments (``add_``, ``.out``)."""
    name, _, overload = op.rpartition(".")
    name = name.rpartition(".")[2]
    if name.endswith("_") and name not in _OR_AND_XOR_SHIFTS:
        return True
    return "out" in overload.split("_") or overload in _OUT_OVERLOADS
