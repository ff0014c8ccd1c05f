"""Caches of functions that a model calls, which must not keep what a trace has put there."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

# Whose caches hold no values of models, and many others.
_LIBRARIES = frozenset({"torch", "sympy", "mpmath", "numpy", "onnx", "onnxscript", "re"})
_CONTAINERS = frozenset({dict, tuple, list, set})
_DEPTH = 4  # a dict of tuples in a cache's own dict


@contextlib.contextmanager
def no_traced_values_cached() -> Iterator[None]:
    """Trace; afterwards, no ``functools.lru_cache`` holds a value that has no numbers.

    A model that caches its masks or positions would go on with them outside of the trace, and so
    would every other model that calls the function. Such a cache is emptied.
    """
    try:
        yield
    finally:
        for cache in _caches():
            if _holds_fake(cache):
                cache.cache_clear()


def _caches() -> list[Any]:
    kind: Any = functools._lru_cache_wrapper
    found = [value for value in gc.get_referrers(kind) if type(value) is kind]
    return [c for c in found if _library(c) not in _LIBRARIES and c.cache_info().currsize]


def _library(cache: Any) -> str:
    return str(getattr(cache, "__module__", "")).partition(".")[0]


def _holds_fake(cache: Any) -> bool:
    layer = [cache]
    for _ in range(_DEPTH):
        values = gc.get_referents(*layer)
        if any(isinstance(value, torch.Tensor) and is_fake(value) for value in values):
            return True
        layer = [value for value in values if type(value) in _CONTAINERS]
    return False
