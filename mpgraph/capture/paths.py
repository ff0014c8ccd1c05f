"""What the inputs of a graph from Dynamo stand for, and where in the model its nodes are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from mpgraph.capture.captured import Slot
from mpgraph.weights import is_trainable_leaf

_ROOT = re.compile(r"L\['(\w+)'\]")


def label_placeholders(
    gm: fx.GraphModule, examples: Sequence[Any], paths: Mapping[int, str]
) -> None:
    """Say which inputs are parameters, which may carry gradients, and how to call them."""
    prefixes: dict[str, str] = {}
    for index, (node, value) in enumerate(
        zip(gm.graph.find_nodes(op="placeholder"), examples, strict=True)
    ):
        path = paths.get(id(value))
        root, inner = _split(_source(node))
        if path is not None and path.endswith(inner):
            prefixes.setdefault(root, path.removesuffix(inner).rstrip("."))
        is_parameter = isinstance(value, nn.Parameter)
        name = path or inner or root or node.name
        node.meta["slot"] = Slot("parameter" if is_parameter else "input", name, index)
        node.meta["leaf"] = is_trainable_leaf(value)
        node.meta["differentiable"] = isinstance(value, torch.Tensor) and value.requires_grad
        node.meta["readable_name"] = re.sub(r"\W", "_", f"p_{name}" if is_parameter else name)
    gm.meta["relocate"] = _relocate(prefixes)


def _source(node: fx.Node) -> str:
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _split(text: str) -> tuple[str, str]:
    """``("self", "layers.0.weight")`` for ``L['self']._modules['layers']._modules['0'].weight``."""
    match = _ROOT.match(text)
    if match is None:
        return "", ""
    rest = re.sub(r"\[['\"]?([^]'\"]*)['\"]?\]", r".\1", text[match.end() :])
    parts = [p for p in rest.split(".") if p and p not in _TABLES]
    return match[1], ".".join(parts)


_TABLES = frozenset({"_modules", "_parameters", "_buffers", "__dict__"})


def relocated(root: str) -> Callable[[str], str]:
    """The same for a module inside what Dynamo compiles, whose own place is ``root``."""
    variable, prefix = _split(re.sub(r"@\d+", "", root))

    def relocate(place: str) -> str:
        found, inner = _split(re.sub(r"@\d+", "", place))
        if found == variable and (inner == prefix or inner.startswith(f"{prefix}.")):
            inner = inner[len(prefix) :].lstrip(".")
        return inner

    return relocate


def _relocate(prefixes: Mapping[str, str]) -> Callable[[str], str]:
    """From the place that Dynamo gives a node, relative to a frame's variable, to the model's."""

    def relocate(place: str) -> str:
        root, inner = _split(re.sub(r"@\d+", "", place))
        return ".".join(filter(None, (prefixes.get(root, ""), inner)))

    return relocate
