"""Kernels of torch's operators that are written in Python, in the place of others for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch._C import DispatchKey

Kernel = Callable[..., Any]


class PythonKernels:
    """While this is active, operators have these kernels at a key; None: torch's in C++.

    It may be entered by several threads, and inside of itself.
    """

    def __init__(
        self, kernels: Mapping[Any, Kernel | None], key: DispatchKey = DispatchKey.Autograd
    ) -> None:
        self._kernels, self._key = kernels, key
        self._lock = threading.Lock()
        self._entered = 0
        self._set_aside: dict[Any, Kernel | None] = {}

    def __enter__(self) -> None:
        with self._lock:
            if not self._entered:
                self.begin()
            self._entered += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered -= 1
            if not self._entered:
                self.end()

    def begin(self) -> None:
        """Put them in place."""
        self._set_aside = {t: t.py_kernels.get(self._key) for t in self._kernels}
        self._put(self._kernels)

    def end(self) -> None:
        """Put back what was there."""
        self._put(self._set_aside)

    def _put(self, kernels: Mapping[Any, Kernel | None]) -> None:
        for target, kernel in kernels.items():
            target.py_kernels.pop(self._key, None)
            if kernel is not None:
                target.py_kernels[self._key] = kernel
            target._dispatch_cache.clear()  # which kernels torch has looked up before
