"""Sessions of onnxruntime, and the check that they round as they are told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mpgraph.runtime.errors import RuntimeSupportError
from mpgraph.runtime.manifest import ROUNDING, Manifest
from mpgraph.runtime.providers import check_started, load_libraries, names_of

OLDEST = (1, 17)
# float32 numbers and what has to become of them: a tie, one above, a subnormal, overflow.
_PROBES = (1.0, 1.00048828125, 1.0004883, 1.00390625, 1.0039063, 3.1415927, -2.7182817, 6e-8, 2.5)


def make_session(path: Path, providers: Sequence[Any], threads: int | None) -> Any:
    """A session for one file."""
    _check_version()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # One block for all temporary values of a step is a third larger than what they need in turn.
    options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    load_libraries(providers)
    try:
        session = ort.InferenceSession(str(path), options, providers=[*providers])
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeSupportError(
            f"onnxruntime {ort.__version__} cannot load {path} on {names_of(providers)}: {reason}"
        ) from error
    check_started(session, providers)
    session.disable_fallback()
    return session


def _check_version() -> None:
    found = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if found < OLDEST:
        raise RuntimeSupportError(
            f"onnxruntime {ort.__version__} is too old: {OLDEST[0]}.{OLDEST[1]} is the first whose "
            "casts round as they are told. pip install -U onnxruntime."
        )


def check_rounding(folder: Path, manifest: Manifest, providers: Sequence[Any]) -> None:
    """Refuse a runtime that takes 16-bit roundings out, or overflows that a step has to see.

    Raises:
        RuntimeSupportError: Shows a number, what it became and what was expected.
    """
    if ROUNDING not in manifest.files:
        return
    session = make_session(folder / ROUNDING, providers, None)
    x = np.array(_PROBES, dtype=np.float32)
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": x})))  # noqa: B905
    for name, values in found.items():
        once = _ROUNDED[name]
        expected = once(once(once(x) * np.float32(3e4)) * np.float32(1e-4))
        if not np.array_equal(values, expected, equal_nan=True):
            index = int(np.argmax(values != expected))
            raise RuntimeSupportError(
                f"onnxruntime {ort.__version__} on {names_of(providers)} does not round to {name}: "
                f"{x[index]!r} became {values[index]!r}, expected {expected[index]!r}. Training "
                "would differ from what was exported. Use another version or provider."
            )


def _to_float16(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def _to_bfloat16(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


_ROUNDED = {"float16": _to_float16, "bfloat16": _to_bfloat16}
