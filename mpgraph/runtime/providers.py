"""Which execution providers of onnxruntime run a step, and with which options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnxruntime as ort

from mpgraph.runtime.errors import RuntimeSupportError
from mpgraph.runtime.manifest import Manifest

# A name and its options, as onnxruntime takes them.
Provider = tuple[str, dict[str, Any]]
CUDA = "CUDAExecutionProvider"


def providers_of(manifest: Manifest, asked: Sequence[Any] | None) -> list[Provider]:
    """The execution providers to use, CPU last.

    Raises:
        RuntimeSupportError: One that was asked for, or that the step was exported for, is not
            there.
    """
    available = ort.get_available_providers()
    if asked is not None:
        for name in map(_name, asked):
            if name not in available:
                raise RuntimeSupportError(
                    f"this onnxruntime has no {name}; it has {', '.join(available)}."
                )
        return [with_options(provider, manifest.precision) for provider in asked]
    if manifest.provider not in available:
        raise RuntimeSupportError(
            f"the step was exported with target={manifest.target!r}, for {manifest.provider}, and "
            f"this onnxruntime has {', '.join(available)}. Install one that has it "
            "(onnxruntime-gpu), or export the step with target='cpu'. providers=[...] runs it "
            "nevertheless; 16-bit nodes may be computed in another precision then."
        )
    wanted = dict.fromkeys([manifest.provider, "CPUExecutionProvider"])
    return [with_options(name, manifest.precision) for name in wanted]


def with_options(provider: Any, precision: str) -> Provider:
    """A provider and its options; one that was given by its name alone, with those it needs.

    The CUDA provider rounds the factors of fp32 products to TF32 unless it is told not to (its
    option ``use_tf32``).
    """
    if not isinstance(provider, str):
        return tuple(provider)
    return provider, {"use_tf32": int(precision == "tf32")} if provider == CUDA else {}


def device_of(providers: Sequence[Any]) -> str:
    """Where state lies: "cuda" or "cpu"."""
    return "cuda" if names_of(providers[:1]) == CUDA else "cpu"


def names_of(providers: Sequence[Any]) -> str:
    """Their names, for people."""
    return ", ".join(map(_name, providers))


def load_libraries(providers: Sequence[Any]) -> None:
    """Load what the CUDA provider needs from where pip puts it, if torch has not done so."""
    if device_of(providers) == "cuda" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()


def check_started(session: Any, asked: Sequence[Any]) -> None:
    """Refuse what onnxruntime does in silence: leave out a provider that does not start.

    Raises:
        RuntimeSupportError: Names the provider.
    """
    found = session.get_providers()
    if missing := [name for name in map(_name, asked) if name not in found]:
        raise RuntimeSupportError(
            f"{missing[0]} does not start on this machine, though this onnxruntime has it: a "
            "driver or a library that it needs is not there (for CUDA: pip install "
            "'onnxruntime-gpu[cuda,cudnn]'). Its own message is above. To train on the CPU, "
            "export the step with target='cpu'."
        )


def _name(provider: Any) -> str:
    return str(provider if isinstance(provider, str) else provider[0])
