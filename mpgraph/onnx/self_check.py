"""A written file's results next to torch's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mpgraph.errors import ExportError
from mpgraph.onnx.report import Check
from mpgraph.onnx.targets import Target

# What a wrong file exceeds and roundings do not: the largest difference, relative to the largest
# element. Roundings of single nodes are 2**-9 in bf16, 2**-12 in fp16; a deep model adds up some.
TOLERANCES: dict[torch.dtype | None, float] = {
    torch.bfloat16: 2**-4,
    torch.float16: 2**-7,
    None: 1e-3,
}


def run_file(
    path: Path, inputs: Sequence[str], values: Sequence[torch.Tensor], provider: str
) -> list[torch.Tensor]:
    """The outputs that onnxruntime gives.

    Raises:
        ExportError: onnxruntime refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        feed = {
            name: _to_runtime(value, declared.type)
            for name, value, declared in zip(inputs, values, session.get_inputs(), strict=True)
        }
        results = session.run_with_ort_values(None, feed)
    except Exception as error:
        raise ExportError(f"onnxruntime cannot run the file: {error}") from error
    return [_to_torch(result) for result in results]


def _to_runtime(value: torch.Tensor, declared: str) -> Any:
    import onnxruntime

    value = value.detach().cpu().contiguous()
    if declared == "tensor(float)":
        value = value.float()
    if value.dtype is torch.bfloat16:
        bits = value.view(torch.int16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy())


_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


def _to_torch(value: Any) -> torch.Tensor:
    if value.data_type() == "tensor(bfloat16)":
        return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()).clone()
    return torch.from_numpy(value.numpy().copy())


def compare(
    found: Sequence[torch.Tensor],
    exported: Sequence[torch.Tensor],
    converted: Sequence[torch.Tensor],
    compute: torch.dtype | None,
) -> Check:
    """How far ``found`` is from the exported graph and from the converted model."""
    error = max(map(difference, found, exported), default=0.0)
    unit = torch.finfo(compute or torch.float32).eps
    return Check(
        error=error,
        units=error / unit,
        against_model=max(map(difference, found, converted), default=0.0),
        identical=all(_same(a, b) for a, b in zip(found, exported, strict=True)),
    )


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference relative to the largest element; infinite where NaNs differ."""
    found, wanted = found.double(), wanted.detach().cpu().double()
    if found.shape != wanted.shape or not torch.equal(found.isfinite(), wanted.isfinite()):
        return math.inf
    finite = wanted.isfinite()
    if not torch.equal(found[~finite].nan_to_num(nan=1.5), wanted[~finite].nan_to_num(nan=1.5)):
        return math.inf
    if not finite.any():
        return 0.0
    scale = float(wanted[finite].abs().max())
    return float((found[finite] - wanted[finite]).abs().max()) / (scale or 1.0)


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    wanted = wanted.detach().cpu()
    return found.dtype is wanted.dtype and torch.equal(
        torch.nan_to_num(found), torch.nan_to_num(wanted)
    )


def demand(check: Check, compute: torch.dtype | None, target: Target) -> None:
    """Refuse a file that computes something else.

    Raises:
        ExportError: It is further from the exported graph than roundings are.
    """
    limit = TOLERANCES[compute]
    if not check.error <= limit:
        raise ExportError(
            f"the file computes something else: on the example inputs, its results in "
            f"onnxruntime ({target.provider}) are {check.error:.1e} of the largest element away "
            f"from torch's, and roundings explain {limit:.1e}. Nothing was written. Please report "
            "this; verify=False writes the file nevertheless."
        )
