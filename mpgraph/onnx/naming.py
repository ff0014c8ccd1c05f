"""Names that lead back to a model: of the sizes that vary, and of the nodes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mpgraph.onnx.extra import library
from mpgraph.onnx.translate import LINE, MODULE, all_values


def name_axes(model: Any, names: Mapping[str, str]) -> None:
    """Give symbolic dimensions readable names, in expressions too: ``2*batch``.

    A symbol that tracing has made a number of is one: as a name, "2" would take any size.
    """
    onnx_ir = library("onnx_ir")
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")

    def renamed(size: Any) -> Any:
        # An unknown size stays unknown: as a name, "None" would say that all of them are equal.
        text = getattr(size, "value", None)
        if not isinstance(text, str):
            return size
        named = pattern.sub(lambda m: names[m[1]], text) if names else text
        return int(named) if named.isdigit() else named

    for value in all_values(model):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(map(renamed, value.shape))


def axis_names(
    gm: fx.GraphModule, inputs: Sequence[str], given: Mapping[str, Mapping[int, str]], state: Any
) -> dict[str, str]:
    """For each symbol in an input's shape, a name: the caller's, or batch, sequence and so on."""
    names: dict[str, str] = {}
    nodes = [n for n in gm.graph.find_nodes(op="placeholder") if n.name not in state]
    for node, name in zip(nodes, inputs, strict=True):
        value = node.meta["val"]
        for dim, size in enumerate(value.shape):
            symbol = "" if isinstance(size, int) else str(size.node.expr)
            if symbol.isidentifier() and symbol not in names:
                wanted = given.get(name, {}).get(dim) or _usual_name(value, dim, name)
                taken = wanted in names.values()
                names[symbol] = f"{wanted}_{name}" if taken else wanted
    return names


def _usual_name(value: torch.Tensor, dim: int, name: str) -> str:
    if dim == 0:
        return "batch"
    is_sequence = value.dim() == 3 or (value.dim() == 2 and not value.is_floating_point())
    return "sequence" if dim == 1 and is_sequence else f"{name}_dim_{dim}"


def name_nodes(model: Any) -> None:
    """Name every node by its module and operator."""
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        module, line = (node.metadata_props.get(key, "") for key in (MODULE, LINE))
        base = f"{module}/{node.op_type}" if module else str(node.op_type)
        number = counts[base] = counts.get(base, -1) + 1
        node.name = f"{base}_{number}" if number else base
        node.metadata_props.clear()
        node.doc_string = None
        if module:
            node.metadata_props["mpgraph.module"] = module
        if line:
            node.metadata_props["mpgraph.line"] = line
