"""A graph as stable text: names, dtypes, shapes, every argument; no paths, no object ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from mpgraph import ir
from mpgraph.plain import STATE

_TORCH_NAMES: dict[Any, str] = {
    torch.strided: "strided",
    torch.contiguous_format: "contiguous",
    torch.preserve_format: "preserve",
    torch.channels_last: "channels_last",
}


def format_graph(graph: fx.Graph, *, decisions: bool = False) -> str:
    """One line per node, in order.

    Args:
        graph: Any graph in mpgraph's form.
        decisions: Append the rule by which each node's dtype was chosen.
    """
    symbols = _Symbols()
    return "\n".join(_line(node, symbols, decisions) for node in graph.nodes)


class _Symbols:
    """Symbolic sizes renamed to s0, s1, … in order of appearance."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def rename(self, text: str) -> str:
        return re.sub(r"\b[su]\d+\b", self._name, text)

    def _name(self, match: re.Match[str]) -> str:
        kind = "u" if match.group().startswith("u") else "s"
        return self.names.setdefault(match.group(), f"{kind}{len(self.names)}")


def _line(node: fx.Node, symbols: _Symbols, decisions: bool) -> str:
    note = _note(node) if decisions else ""
    if node.op == "output":
        return f"return {_argument(node.args[0], symbols)}"
    return f"%{node.name}{_type(node, symbols)} = {_call(node, symbols)}{note}"


def _note(node: fx.Node) -> str:
    if ir.is_inserted(node):
        return "  # cast"
    decision: ir.Decision | None = node.meta.get("decision")
    if decision is None:
        return ""
    dtype = decision.dtype or decision.argument
    target = f" -> {ir.short_name(dtype)}" if dtype else ""
    return f"  # {decision.rule.value}{target} ({decision.source})"


def _type(node: fx.Node, symbols: _Symbols) -> str:
    val = node.meta.get("val")
    return f": {format_value(val, symbols.rename)}" if val is not None else ""


def format_value(val: Any, rename: Callable[[str], str] = str) -> str:
    """``bf16[4, 8]`` for a tensor, a tuple of such for several, ``Sym(s0)`` for a size."""
    if isinstance(val, torch.Tensor):
        sizes = ", ".join(rename(str(size)) for size in val.shape)
        return f"{ir.short_name(val.dtype)}[{sizes}]"
    if isinstance(val, (list, tuple)):
        return f"({', '.join(format_value(item, rename) for item in val)})"
    return rename(f"Sym({val})") if isinstance(val, ir_symbols) else type(val).__name__


ir_symbols = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _call(node: fx.Node, symbols: _Symbols) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"attribute {node.target}"
    arguments = [_argument(argument, symbols) for argument in node.args]
    arguments += [f"{key}={_argument(value, symbols)}" for key, value in node.kwargs.items()]
    return f"{target_name(node)}({', '.join(arguments)})"


def target_name(node: fx.Node) -> str:
    """``linear`` for ``aten.linear.default``, ``sum.dim_IntList`` where overloads differ."""
    if ir.is_operator(node):
        return str(node.target).removeprefix("aten.").removesuffix(".default")
    return str(getattr(node.target, "__name__", node.target))


def _argument(value: Any, symbols: _Symbols) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, tuple):
        inner = ", ".join(_argument(item, symbols) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(_argument(item, symbols) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_argument(v, symbols)}' for k, v in value.items())}}}"
    return _literal(value, symbols)


def _literal(value: Any, symbols: _Symbols) -> str:
    if isinstance(value, torch.dtype):
        return ir.short_name(value)
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return f"slice({', '.join(_argument(part, symbols) for part in parts)})"
    if isinstance(value, ir_symbols):
        return symbols.rename(str(value))
    if value in _TORCH_NAMES if isinstance(value, (torch.layout, torch.memory_format)) else False:
        return _TORCH_NAMES[value]
    return repr(value) if _has_stable_repr(value) else type(value).__name__


def _has_stable_repr(value: Any) -> bool:
    return " at 0x" not in repr(value)


def text(model: Any) -> str:
    """The rewritten graphs of a converted model (or one fx graph) as text.

    Args:
        model: A converted module that has run or was given ``example_inputs``, a model or wrapper
            with one in it, an ``fx.GraphModule`` or an ``fx.Graph``.

    Raises:
        MPGraphError: As :func:`mpgraph.explain`.
    """
    if isinstance(model, fx.Graph):
        return format_graph(model)
    if isinstance(model, fx.GraphModule) and STATE not in vars(model):
        return "\n\n".join(_bodies(model))
    from mpgraph.finding import captured_state
    from mpgraph.report.build import sources_of

    return "\n\n".join(
        f"# {source.label}\n" + "\n\n".join(_bodies(source.graph_module))
        for entry in captured_state(model).specialisations()
        for source in sources_of(entry)
    )


def _bodies(gm: fx.GraphModule, name: str = "") -> Iterator[str]:
    yield (f"# sub-graph {name}\n" if name else "") + format_graph(gm.graph)
    for child, body in ir.call_graphs(gm):
        yield from _bodies(body, f"{name}.{child}" if name else child)
