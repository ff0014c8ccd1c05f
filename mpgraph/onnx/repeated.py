"""torchlib's translations, written once for nodes that are alike and copied for the others.

What a translation writes depends on the dtypes and sizes of the tensors that it is given, and on
the numbers beside them. To write it anew takes ten times as long as to copy it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Translation = Callable[..., Any]


class RepeatedTranslations:
    """A table of translations for one graph, in the place of ``torch.onnx``'s own.

    Args:
        registry: torch.onnx's ``ONNXRegistry``.
    """

    def __init__(self, registry: Any) -> None:
        self._registry = registry
        self._found: dict[Any, list[Any]] = {}

    @property
    def opset_version(self) -> int:
        """The version of the operators."""
        return int(self._registry.opset_version)

    def get_decomps(self, target: Any) -> list[Any]:
        """The translations of an operator, as the registry describes them."""
        if target not in self._found:
            self._found[target] = [_repeated(d) for d in self._registry.get_decomps(target)]
        return self._found[target]


def _repeated(described: Any) -> Any:
    changed = copy.copy(described)
    changed.onnx_function = _Repeated(described.onnx_function)
    return changed


@dataclasses.dataclass
class _Written:
    """What a translation has written.

    Attributes:
        taken: The values that it was given.
        nodes: What it wrote, but for constants, which are shared.
        dtypes: What it said of the values that its nodes yield.
        returned: The value or values that it returned.
    """

    taken: list[Any]
    nodes: list[Any]
    dtypes: dict[Any, Any]
    returned: Any


class _Repeated:
    """A translation that is copied where it was written before."""

    def __init__(self, function: Translation) -> None:
        self.function = function
        self.known: dict[Any, _Written | None] = {}
        self.constants: Any = None

    def __repr__(self) -> str:
        return repr(self.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from onnxscript import evaluator

        recorder: Any = evaluator.default()
        taken: dict[Any, int] = {}
        if recorder.constant_farm is not self.constants:  # another graph has begun
            self.known, self.constants = {}, recorder.constant_farm
        recorder.constant_farm = _Constants(recorder.constant_farm)
        key = _described(args, taken), _described(kwargs, taken)
        if (written := self.known.get(key)) is not None:
            return _copied(written, [*taken], recorder)
        returned = self.function(*args, **kwargs)
        if key not in self.known:
            self.known[key] = _to_repeat([*taken], recorder.nodes, returned)
        return returned


class _Constants:
    """The constants that a graph's nodes share, by number and dtype.

    torch.onnx looks them up by equality, and would give 0.0 to a node that asks for -0.0.
    """

    def __init__(self, known: dict[Any, Any]) -> None:
        self.known = known

    def get(self, key: tuple[Any, Any]) -> Any:
        """The constant, if it is there."""
        return self.known.get((repr(key[0]), key[1]))

    def __setitem__(self, key: tuple[Any, Any], constant: Any) -> None:
        self.known[repr(key[0]), key[1]] = constant


def _described(value: Any, taken: dict[Any, int]) -> Any:
    """What a translation may look at; values of the graph are added to ``taken``."""
    import onnx_ir

    if isinstance(value, onnx_ir.Value):
        index = taken.setdefault(value, len(taken))
        shape = None if value.shape is None else tuple(map(_size, value.shape))
        return "%", index, value.dtype, shape
    if isinstance(value, Mapping):
        return tuple((name, _described(item, taken)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *(_described(item, taken) for item in value)
    # 0.0 and -0.0 are equal, and not the same; so are 1 and True.
    return type(value), repr(value) if isinstance(value, float) else value


def _size(size: Any) -> Any:
    return size if isinstance(size, int) else size.value


def _to_repeat(taken: list[Any], nodes: Sequence[Any], returned: Any) -> _Written | None:
    """What can be copied; None where the nodes hold graphs, or a constant is returned."""
    written = [node for node in nodes if node.op_type != "Constant"]
    dtypes = {value: value.dtype for node in written for value in node.outputs}
    values = returned if isinstance(returned, Sequence) else [returned]
    known = all(value in dtypes or value in taken for value in values)
    if not known or any(_holds_a_graph(node) for node in written):
        return None
    return _Written(taken, written, dtypes, returned)


def _holds_a_graph(node: Any) -> bool:
    import onnx_ir

    graphs = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)
    return any(attribute.type in graphs for attribute in node.attributes.values())


def _copied(written: _Written, taken: list[Any], recorder: Any) -> Any:
    import onnx_ir
    from torch.onnx._internal.exporter._tensors import SymbolicTensor

    values: dict[Any, Any] = dict(zip(written.taken, taken, strict=True))
    for node in written.nodes:
        for value in node.outputs:
            values[value] = SymbolicTensor(recorder.opset)
            if (dtype := written.dtypes[value]) is not None:
                values[value].dtype = dtype
        recorder.nodes.append(
            onnx_ir.Node(
                node.domain, node.op_type, [values.get(v, v) for v in node.inputs],
                [onnx_ir.Attr(a.name, a.type, a.value) for a in node.attributes.values()],
                overload=node.overload, outputs=[values[v] for v in node.outputs],
                version=node.version,
            )
        )  # fmt: skip
    if isinstance(written.returned, Sequence):
        return [values[value] for value in written.returned]
    return values[written.returned]
