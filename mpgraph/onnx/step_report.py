"""What the export of a training step has written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mpgraph.onnx.report import readable_bytes, titled_rows
from mpgraph.runtime import manifest as files


@dataclasses.dataclass(frozen=True)
class ExportedStep:
    """What :meth:`mpgraph.TrainStep.export_onnx` has written; ``print`` shows it in a few lines.

    Attributes:
        folder: Where.
        manifest: What is in it.
        error: The largest difference between onnxruntime and torch over one step from the same
            state, relative to the largest element of each tensor; None where it was not checked.
            Tensors of nothing but rounding noise are left out.
        file_bytes: The size of each file.
    """

    folder: Path
    manifest: files.Manifest = dataclasses.field(repr=False)
    error: float | None
    file_bytes: dict[str, int] = dataclasses.field(repr=False)

    def text(self) -> str:
        """Folder, files with their sizes, and how far onnxruntime is from torch."""
        manifest = self.manifest
        title = (
            f"{self.folder} · {manifest.precision} · for {manifest.target}, opset {manifest.opset}"
        )
        rows = [(f"  {name}", readable_bytes(size)) for name, size in self.file_bytes.items()]
        return titled_rows(title, [*rows, ("  check", self._check())])

    def __str__(self) -> str:
        return self.text()

    def _check(self) -> str:
        provider = self.manifest.provider
        if self.error is None and provider != "CPUExecutionProvider":
            return f"not made: {provider} does not run here, or verify=False"
        if self.error is None:
            return "not made"
        return f"one step in onnxruntime is within {self.error:.1e} of the step in torch"
