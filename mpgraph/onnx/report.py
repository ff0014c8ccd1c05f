"""What an export has written, for people and for tools."""

from __future__ import annotations

import collections
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclasses.dataclass(frozen=True)
class Check:
    """How far the file's results are from torch's, on the example inputs.

    Attributes:
        error: The largest difference from the graph that was exported, run in torch, relative to
            the largest element of the output.
        units: The same in units in the last place of the compute dtype, at that element.
        against_model: The same as ``error``, from the converted model, whose 16-bit kernels
            round inside in ways of their own.
        identical: Whether every bit of every output is that of the exported graph.
    """

    error: float
    units: float
    against_model: float
    identical: bool


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What :func:`mpgraph.export_onnx` has written.

    Attributes:
        path: The file.
        target: The name of the target.
        opset: The version of the ai.onnx operators.
        precision: The precision of the converted model.
        nodes: How many nodes the file has.
        half_nodes: How many of them yield 16-bit values, casts left out.
        casts: How many are casts between floating-point dtypes.
        file_bytes: The size of the file, and of external data.
        inputs: Each input as ``name: dtype[sizes]``.
        outputs: Each output likewise.
        check: How far the file is from torch; None if that was not asked, or onnxruntime is not
            installed.
        notes: What to know besides.
    """

    path: str
    target: str
    opset: int
    precision: str
    nodes: int
    half_nodes: int
    casts: int
    file_bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    check: Check | None
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """The report as a few lines of text."""
        title = f"{self.path} · {self.precision} · for {self.target}, opset {self.opset}"
        return titled_rows(title, self._rows())

    def __str__(self) -> str:
        return self.text()

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("  takes", line) for line in self.inputs]
        rows += [("  gives", line) for line in self.outputs]
        sizes = f"{self.nodes}, {self.half_nodes} of them on 16-bit values, {self.casts} casts"
        rows.append(("  nodes", sizes))
        rows.append(("  size", readable_bytes(self.file_bytes)))
        rows.append(("  check", self._check()))
        return rows + [("  note", note) for note in self.notes]

    def _check(self) -> str:
        if self.check is None:
            return "not made"
        if self.check.identical:
            same = "onnxruntime gives the bits of the exported graph in torch"
        else:
            same = (
                f"onnxruntime is within {self.check.error:.1e} of the exported graph in torch "
                f"({self.check.units:.2g} units in the last place)"
            )
        return f"{same}; {self.check.against_model:.1e} from the converted model"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return dataclasses.asdict(self)


def titled_rows(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A line, and below it a name and a text to each row."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(name, Text(value))
    console = Console(
        file=io.StringIO(), width=100, highlight=False, legacy_windows=False, markup=False
    )
    console.print(title)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def readable_bytes(count: int) -> str:
    """``12.3 kB``."""
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def count_nodes(model: Any) -> tuple[int, int, int]:
    """Of an ``onnx_ir`` model: its nodes, those on 16-bit values, and its floating-point casts."""
    kinds = collections.Counter(map(_kind, model.graph.all_nodes()))
    return sum(kinds.values()), kinds["half"], kinds["cast"]


def _kind(node: Any) -> str:
    names = {value.dtype.name for value in (*node.inputs, *node.outputs) if value and value.dtype}
    if node.op_type == "Cast":
        return "cast" if all("FLOAT" in name for name in names) else "other"
    return "half" if names & {"FLOAT16", "BFLOAT16"} else "other"
