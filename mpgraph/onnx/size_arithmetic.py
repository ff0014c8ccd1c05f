"""Arithmetic on symbolic sizes, done once for equal sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.sym_node import SymNode

# What depends on the operands alone. Not "mod", which asks how large they may be.
_PURE = (
    "add", "sub", "mul", "int_floordiv", "sym_max", "sym_min",
    "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_",
)  # fmt: skip


@contextlib.contextmanager
def sizes_computed_once() -> Iterator[None]:
    """Ask sympy once what an operation on sizes gives, and not in every operator of a trace.

    Each operator compares, multiplies and adds the sizes of its tensors a few dozen times: in the
    export of a GPT of 12 layers that makes 160,000 operations, of which 1,500 are different ones.
    What a trace records is computed as always.
    """
    known: dict[Any, SymNode] = {}
    before = {name: getattr(SymNode, name) for name in _PURE}
    for name, compute in before.items():
        setattr(SymNode, name, _once(name, compute, known))
    try:
        yield
    finally:
        for name, compute in before.items():
            setattr(SymNode, name, compute)


def _once(name: str, compute: Callable[..., Any], known: dict[Any, SymNode]) -> Any:
    def computed(self: SymNode, other: Any) -> Any:
        if type(other) is not SymNode or self.shape_env is None or get_proxy_mode() is not None:
            return compute(self, other)
        # Once a symbol has become a number, results are simpler: the version says so.
        key = (
            name, self.shape_env, self.shape_env._version_counter,
            self._expr, self._hint, self.pytype, other._expr, other._hint, other.pytype,
        )  # fmt: skip
        if key not in known:
            known[key] = compute(self, other)
        return known[key]

    return computed
