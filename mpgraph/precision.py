"""Precisions by name: what runs in 16 bit, and what the parameters are stored in."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from typing import Any

import torch

from mpgraph.errors import PrecisionError
from mpgraph.warn import warn

logger = logging.getLogger("mpgraph")


@dataclasses.dataclass(frozen=True)
class Precision:
    """A resolved precision.

    Attributes:
        name: As the user may write it.
        compute: The dtype that operators are lowered to; None for no lowering at all.
        pure: The parameters themselves are stored in ``compute``; there are no fp32 masters.
        tf32: Float32 matrix products may use TF32.
    """

    name: str
    compute: torch.dtype | None = None
    pure: bool = False
    tf32: bool = False


PRECISIONS: dict[str, Precision] = {
    "bf16": Precision("bf16", torch.bfloat16),
    "fp16": Precision("fp16", torch.float16),
    "fp32": Precision("fp32"),
    "tf32": Precision("tf32", tf32=True),
    "bf16-true": Precision("bf16-true", torch.bfloat16, pure=True),
    "fp16-true": Precision("fp16-true", torch.float16, pure=True),
}
_BY_DTYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def resolve_precision(value: str | torch.dtype, device: str) -> Precision:
    """Turn what the user wrote into a :class:`Precision`.

    Args:
        value: A name of ``PRECISIONS``, ``"auto"``, or a dtype.
        device: The device type that the model computes on: "cpu", "cuda", …

    Raises:
        PrecisionError: The value names no precision; lists near misses.
    """
    name = _BY_DTYPE.get(value, str(value)) if isinstance(value, torch.dtype) else value
    if name == "auto":
        name = _automatic(device)
    if name in PRECISIONS:
        return PRECISIONS[name]
    near = difflib.get_close_matches(str(name).lower(), [*PRECISIONS, "auto"], n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise PrecisionError(
        f"unknown precision {value!r}.{hint} Use one of {', '.join(PRECISIONS)}, auto, "
        "torch.bfloat16, torch.float16 or torch.float32."
    )


def _automatic(device: str) -> str:
    """bf16 where the hardware has it, else fp16 on CUDA, else bf16 with a warning."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device == "cpu" and not _cpu_has_bf16():
        warn(
            "this CPU has no 16-bit instructions (avx512_bf16, amx or the Arm "
            "equivalent); bf16 is emulated and may be slower than float32."
        )
    return "bf16"


def _cpu_has_bf16() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    names = ("avx512_bf16", "amx_bf16", "amx_tile", "bf16", "sve_bf16", "arm_bf16")
    if any(capabilities.get(name) for name in names):
        return True
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


def allow_tf32() -> None:
    """Let float32 matrix products and convolutions use TF32, and say so."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    logger.warning(
        "precision='tf32': float32 matrix products may now use TF32 in this whole process "
        "(torch.set_float32_matmul_precision('high'))."
    )
