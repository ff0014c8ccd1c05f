"""Which sizes of a batch vary from call to call, learnt from the batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# For one tensor: its sizes, None for those that vary.
Pattern = tuple[int | None, ...]


class Sizes:
    """Takes sizes for fixed until a batch comes in which they are others, as torch.compile does.

    Sizes of 0 and 1 are taken as they are: such a dimension is another kind of dimension.

    Args:
        dynamic: False: every size is fixed. True: none is. None: those are not that have changed.
    """

    def __init__(self, dynamic: bool | None) -> None:
        self.dynamic = dynamic
        self._known: dict[Any, list[Pattern]] = {}

    def patterns(self, kind: Any, leaves: Sequence[torch.Tensor]) -> list[Pattern]:
        """The sizes of each tensor of a batch; batches of one ``kind`` differ in them alone."""
        sizes: list[Pattern] = [tuple(leaf.shape) for leaf in leaves]
        if self.dynamic is False or any(0 in size or 1 in size for size in sizes):
            return sizes
        if self.dynamic:
            return [(None,) * len(size) for size in sizes]
        known = self._known.get(kind, sizes)
        self._known[kind] = [_joined(*pair) for pair in zip(known, sizes, strict=True)]
        return self._known[kind]

    def fix(self) -> bool:
        """Take every size for fixed from now on; False where none is to be."""
        can_be = not self.dynamic
        if can_be:
            self.dynamic = False
        return can_be


def _joined(known: Pattern, sizes: Pattern) -> Pattern:
    return tuple(k if k == n else None for k, n in zip(known, sizes, strict=True))


def varying(pattern: Pattern) -> frozenset[int]:
    """The dimensions whose size varies."""
    return frozenset(index for index, size in enumerate(pattern) if size is None)


class SizeGuards:
    """For which batches a graph with symbolic sizes holds.

    Args:
        values: The fake tensors that it was traced with, one per tensor of a batch.
        models: For each converted model that it calls: whether the model's own graph holds for
            given arguments, and the arguments of the trace.
    """

    def __init__(
        self,
        values: Sequence[Any],
        models: Sequence[tuple[Callable[[Sequence[Any]], bool], Sequence[Any]]] = (),
    ) -> None:
        self.values, self.models = values, models
        self._checked: dict[Any, bool] = {}

    def hold(self, leaves: Sequence[torch.Tensor]) -> bool:
        """Whether these sizes are what the trace, and the compiler after it, took for granted."""
        shapes = tuple([leaf.shape for leaf in leaves])
        shape_env = next(iter(self.values)).fake_mode.shape_env if self.values else None
        if shape_env is None:
            return True
        key = shapes, len(shape_env.guards)
        if key not in self._checked:
            self._checked[key] = self._check(shapes, shape_env)
        return self._checked[key]

    def _check(self, shapes: Sequence[Sequence[int]], shape_env: Any) -> bool:
        sizes: dict[Any, int] = {}
        for value, shape in zip(self.values, shapes, strict=True):
            for symbolic, size in zip(value.shape, shape, strict=True):
                if not isinstance(symbolic, torch.SymInt):
                    if symbolic != size:
                        return False
                # Equal sizes of the first batch share a symbol.
                elif sizes.setdefault(symbolic.node._expr, size) != size or size < 2:
                    return False
        asked = [guard.expr for guard in shape_env.guards]
        if not all(bool(e.subs(sizes)) for e in asked if e.free_symbols <= sizes.keys()):
            return False
        return all(accepts([_sized(v, sizes) for v in leaves]) for accepts, leaves in self.models)


def _sized(value: Any, sizes: Mapping[Any, int]) -> Any:
    """A tensor without memory, of the sizes that a traced one has for these sizes of a batch."""
    if not isinstance(value, torch.Tensor):
        return value
    shape = [
        int(n.node._expr.subs(sizes)) if isinstance(n, torch.SymInt) else n for n in value.shape
    ]
    return torch.empty(shape, dtype=value.dtype, device="meta")
