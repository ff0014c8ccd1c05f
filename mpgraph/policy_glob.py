"""The globs that a policy's overrides are written in."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Iterable

_WILDCARDS = re.compile(r"(\*|\?|\[[^\]]+\])")


@functools.cache
def module_glob(pattern: str) -> re.Pattern[str]:
    """Compile a glob over dotted module paths; it matches a module and everything below it.

    ``*`` and ``?`` stay within one segment, ``**`` spans any number of segments, ``[0-3]`` is
    one character: ``decoder.layers.*.mlp``, ``**.norm``, ``layers.[0-3]``.
    """
    regex = ""
    segments = pattern.split(".")
    for segment in segments[:-1]:
        regex += r"(?:[^.]+\.)*" if segment == "**" else _segment(segment) + r"\."
    regex += ".*" if segments[-1] == "**" else _segment(segments[-1]) + r"(?:\..*)?"
    return re.compile(regex, re.DOTALL)


@functools.cache
def name_glob(pattern: str) -> re.Pattern[str]:
    """Compile a glob over whole names, in which ``*`` matches anything."""
    return re.compile(fnmatch.translate(pattern))


def op_names(op: str) -> tuple[str, ...]:
    """The names that an ``op`` glob may match: with and without namespace and overload.

    ``aten.softmax.int`` is also ``softmax.int``, ``aten.softmax`` and ``softmax``.
    """
    base, _, overload = op.rpartition(".")
    namespace, _, name = base.rpartition(".")
    if not namespace:
        return (op,)
    return (op, base, f"{name}.{overload}", name)


def matches_op(pattern: str, op: str) -> bool:
    """Whether ``pattern`` matches one of the operator's names."""
    regex = name_glob(pattern)
    return any(regex.fullmatch(name) for name in op_names(op))


def with_parents(path: str) -> list[str]:
    """``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    segments = path.split(".")
    return [".".join(segments[: end + 1]) for end in range(len(segments))]


def near_misses(value: str, names: Iterable[str]) -> str:
    """``; close to it: 'softmax'``, or "" where nothing comes close."""
    close = difflib.get_close_matches(value, sorted(names), n=3, cutoff=0.5)
    return f"; close to it: {', '.join(map(repr, close))}" if close else ""


def _segment(pattern: str) -> str:
    return "".join(_piece(piece) for piece in _WILDCARDS.split(pattern))


def _piece(piece: str) -> str:
    if piece == "*":
        return "[^.]*"
    if piece == "?":
        return "[^.]"
    if len(piece) > 1 and piece.startswith("[") and piece.endswith("]"):
        inside = piece[1:-1].replace("\\", r"\\").replace("[", r"\[")
        # A leading "^" would negate in a regex; in a glob only "!" does.
        inside = "^" + inside[1:] if inside.startswith("!") else inside.replace("^", r"\^")
        return f"[{inside}]"
    return re.escape(piece)
