"""What is in an ONNX file: operators by dtype, casts, inputs and outputs, where it is from."""

from __future__ import annotations

import collections
import dataclasses
import io
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mpgraph.errors import ExportError
from mpgraph.onnx.extra import library
from mpgraph.onnx.report import readable_bytes

_SHORT = {
    "FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64", "INT64": "i64",
    "INT32": "i32", "INT16": "i16", "INT8": "i8", "UINT8": "u8", "BOOL": "bool",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FileSummary:
    """The contents of an ONNX file in numbers.

    Attributes:
        path: The file.
        file_bytes: Its size, external data included.
        opsets: Version by operator domain; "" is ai.onnx.
        producer: What has made it.
        metadata: What the file says about itself.
        inputs: Each input as ``name: dtype[sizes]``.
        outputs: Each output likewise.
        operators: How many nodes there are, by operator and the dtypes that it yields.
        casts: How many casts there are, by the dtypes that they lead from and to.
        weights: The bytes of the weights, by dtype.
    """

    path: str
    file_bytes: int
    opsets: dict[str, int]
    producer: str
    metadata: dict[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: dict[str, dict[str, int]]
    casts: dict[str, int]
    weights: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain values."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """The summary as text."""
        console = Console(file=io.StringIO(), width=100, highlight=False, markup=False)
        opsets = ", ".join(
            f"{name or 'ai.onnx'} {version}" for name, version in self.opsets.items()
        )
        console.print(f"{self.path} · {readable_bytes(self.file_bytes)} · {opsets}")
        for kind, values in (("takes", self.inputs), ("gives", self.outputs)):
            for value in values:
                console.print(f"  {kind}  {value}")
        for name, value in self.metadata.items():
            if name != "mpgraph.opset":  # it is in the first line
                console.print(f"  {name.removeprefix('mpgraph.')}: {value}")
        console.print()
        console.print(self._operators())
        casts = ", ".join(f"{count} {name}" for name, count in self.casts.items()) or "none"
        weights = ", ".join(f"{readable_bytes(n)} {name}" for name, n in self.weights.items())
        console.print(f"\ncasts: {casts}\nweights: {weights or 'none'}")
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def _operators(self) -> Table:
        dtypes = sorted({dtype for counts in self.operators.values() for dtype in counts})
        table = Table(box=None, pad_edge=False)
        table.add_column("operator")
        for dtype in dtypes:
            table.add_column(dtype, justify="right")
        for operator, counts in self.operators.items():
            table.add_row(operator, *(str(counts.get(dtype, "")) for dtype in dtypes))
        return table


def summarize(path: str | os.PathLike[str]) -> FileSummary:
    """Read a file without its external data, and count.

    Raises:
        ExportError: It is missing, or no ONNX file.
    """
    onnx = library("onnx")
    file = Path(path)
    if not file.is_file():
        raise ExportError(f"there is no file {str(path)!r}")
    try:
        model = onnx.load(str(file), load_external_data=False)
        model = onnx.shape_inference.infer_shapes(model)
    except Exception as error:
        raise ExportError(f"{str(path)!r} is not an ONNX file: {error}") from error
    if not model.graph.node and not model.graph.output:
        raise ExportError(f"{str(path)!r} is not an ONNX file: there is no graph in it")
    dtypes = _dtypes(model.graph, onnx)
    operators, casts = _count(model.graph, dtypes)
    return FileSummary(
        path=str(path),
        file_bytes=file.stat().st_size + _external_bytes(file, model),
        opsets={entry.domain: entry.version for entry in model.opset_import},
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        metadata={p.key: p.value for p in model.metadata_props},
        inputs=tuple(_describe(v, onnx) for v in model.graph.input),
        outputs=tuple(_describe(v, onnx) for v in model.graph.output),
        operators=operators,
        casts=casts,
        weights=_weights(model.graph, onnx),
    )


def _name(onnx: Any, element: int) -> str:
    long: str = onnx.TensorProto.DataType.Name(element)
    return _SHORT.get(long, long.lower())


def _dtypes(graph: Any, onnx: Any) -> dict[str, str]:
    found = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type:
            found[value.name] = _name(onnx, value.type.tensor_type.elem_type)
    return {**found, **{i.name: _name(onnx, i.data_type) for i in graph.initializer}}


def _count(graph: Any, dtypes: dict[str, str]) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    operators: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    casts: collections.Counter[str] = collections.Counter()
    for node in graph.node:
        kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        result = dtypes.get(node.output[0], "other") if node.output else "other"
        operators[kind][result] += 1
        if kind == "Cast":
            casts[f"{dtypes.get(node.input[0], '?')} → {result}"] += 1
    by_count = sorted(operators.items(), key=lambda item: (-item[1].total(), item[0]))
    return {kind: dict(counts) for kind, counts in by_count}, dict(casts.most_common())


def _weights(graph: Any, onnx: Any) -> dict[str, int]:
    sizes: collections.Counter[str] = collections.Counter()
    for weight in graph.initializer:
        count = 1
        for size in weight.dims:
            count *= size
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
        sizes[_name(onnx, weight.data_type)] += count * itemsize
    return dict(sizes.most_common())


def _external_bytes(file: Path, model: Any) -> int:
    names = {
        entry.value
        for weight in model.graph.initializer
        for entry in weight.external_data
        if entry.key == "location"
    }
    return sum((file.parent / name).stat().st_size for name in names)


def _describe(value: Any, onnx: Any) -> str:
    kind = value.type.tensor_type
    sizes = ", ".join(d.dim_param or str(d.dim_value) for d in kind.shape.dim)
    return f"{value.name}: {_name(onnx, kind.elem_type)}[{sizes}]"
