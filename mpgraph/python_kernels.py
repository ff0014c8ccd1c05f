"""Kernels of torch's operators that are written in Python, in the place of others for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch._C import DispatchKey
from torch._subclasses import fake_impls

Kernel = Callable[..., Any]


class PythonKernels:
    """While this is active, operators have these kernels at a key; None: torch's in C++.

    ``fakes`` say what operators yield on fake values where torch does not, or refuses them; they
    take the fake mode and the operator before its arguments. It may be entered by several threads,
    and inside of itself.
    """

    def __init__(
        self,
        kernels: Mapping[Any, Kernel | None],
        key: DispatchKey = DispatchKey.Autograd,
        fakes: Mapping[Any, Kernel] | None = None,
    ) -> None:
        self._kernels, self._key, self._fakes = kernels, key, fakes or {}
        self._lock = threading.Lock()
        self._entered = 0
        self._set_aside: dict[Any, Kernel | None] = {}

    def __enter__(self) -> None:
        with self._lock:
            if not self._entered:
                self._begin()
            self._entered += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered -= 1
            if not self._entered:
                self._end()

    def _begin(self) -> None:
        self._set_aside = {t: t.py_kernels.get(self._key) for t in self._kernels}
        self._put(self._kernels)
        for target, fake in self._fakes.items():
            fake_impls.register_op_impl(target)(fake)

    def _end(self) -> None:
        self._put(self._set_aside)
        for target in self._fakes:
            fake_impls._deregister_op_impl(target)

    def _put(self, kernels: Mapping[Any, Kernel | None]) -> None:
        for target, kernel in kernels.items():
            target.py_kernels.pop(self._key, None)
            if kernel is not None:
                target.py_kernels[self._key] = kernel
            target._dispatch_cache.clear()  # which kernels torch has looked up before
