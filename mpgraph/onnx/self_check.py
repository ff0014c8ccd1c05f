"""A written file's results next to torch's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from mpgraph.errors import ExportError
from mpgraph.onnx import run_apart
from mpgraph.onnx.extra import library
from mpgraph.onnx.report import Check
from mpgraph.onnx.targets import Target
from mpgraph.runtime.providers import Provider

# What a wrong file exceeds and roundings do not: the largest difference, relative to the largest
# element. One value that rounds the other way differs by 2**-8 in bf16, 2**-11 in fp16; a deep net
# may amplify that: an untrained EfficientNet differs by 2**-7 in fp16, as it does when one pixel
# changes by 0.01.
TOLERANCES: dict[torch.dtype | None, float] = {
    torch.bfloat16: 2**-3,
    torch.float16: 2**-5,
    None: 1e-3,
}


class Unavailable(Exception):
    """The execution provider does not run on this machine."""


def run_file(
    path: Path,
    inputs: Sequence[str],
    values: Sequence[torch.Tensor],
    provider: Provider,
) -> list[torch.Tensor]:
    """The outputs that onnxruntime gives, run in a process of its own.

    Args:
        path: The file.
        inputs: The names of its inputs.
        values: Their values, of the file's own dtypes.
        provider: The execution provider and its options.

    Raises:
        ExportError: onnxruntime refuses the file, or crashes on it.
        Unavailable: The provider does not run here.
    """
    numpy = library("numpy")
    with tempfile.TemporaryDirectory(prefix="mpgraph-") as name:
        folder = Path(name)
        for index, value in enumerate(values):
            numpy.save(folder / f"input_{index}.npy", _bits(value).numpy())
        is_bf16 = [value.dtype is torch.bfloat16 for value in values]
        call = {
            "file": str(path.resolve()),
            "provider": provider,
            "inputs": list(zip(inputs, is_bf16, strict=True)),
        }
        (folder / "call.json").write_text(json.dumps(call), encoding="utf-8")
        _run(folder)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if "unavailable" in result:
            raise Unavailable(provider[0])
        arrays = [
            torch.from_numpy(numpy.load(folder / f"output_{index}.npy"))
            for index, _ in enumerate(result["outputs"])
        ]
        kinds = result["outputs"]
    return [
        array.view(torch.bfloat16) if kind == "tensor(bfloat16)" else array
        for array, kind in zip(arrays, kinds, strict=True)
    ]


def _bits(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().cpu().contiguous()
    return value.view(torch.uint16) if value.dtype is torch.bfloat16 else value


def _run(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, run_apart.__file__, str(folder)], capture_output=True, text=True
    )
    if done.returncode < 0:
        raise ExportError(
            f"onnxruntime crashes on the file (signal {-done.returncode}): a bug in onnxruntime. "
            "Nothing was written. Please report this; verify=False writes the file nevertheless."
        )
    if done.returncode:
        raise ExportError(
            f"onnxruntime cannot run the file: {done.stderr.strip()}. Nothing was written. "
            "Please report this; verify=False writes the file nevertheless."
        )


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
