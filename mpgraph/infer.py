"""The dtypes that an operator yields for given inputs, asked of torch itself.

Promotion rules are many (zero-dimensional tensors, Python numbers, explicit ``dtype=``), so none
is written down here: the operator runs on fake tensors. The answer depends on the operator and
on the dtypes of its inputs only, so it is asked once per such pair, whatever the graph's size.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from mpgraph import ir
from mpgraph.recurrent import RECURRENT, looked_at

Signature = tuple[Any, ...]


class DtypeInference:
    """Answers, with a memo, which dtypes a node yields if its inputs have given dtypes."""

    def __init__(self) -> None:
        self._memo: dict[Signature, list[torch.dtype | None]] = {}

    def result(self, node: fx.Node, cast_to: torch.dtype | None, extra: dict[str, Any]) -> Any:
        """The value of ``node`` when its eligible inputs are cast to ``cast_to``.

        Shapes are those of the captured value. ``extra`` holds keyword arguments that replace
        the node's own.
        """
        signature = _signature(node, cast_to, extra)
        dtypes = self._memo.get(signature)
        if dtypes is None:
            dtypes = self._memo[signature] = _ask(node, cast_to, extra)
        return _with_dtypes(node.meta["captured"], dtypes)


def _signature(node: fx.Node, cast_to: torch.dtype | None, extra: dict[str, Any]) -> Signature:
    parts: list[Any] = [node.target]

    def note(value: Any) -> None:
        if isinstance(value, fx.Node):
            parts.append(_tensor_part(value.meta.get("val"), cast_to))
        elif isinstance(value, (list, tuple)):
            parts.append(len(value))
            for item in value:
                note(item)
        else:
            parts.append(value if isinstance(value, torch.dtype) else type(value))

    for argument in node.args:
        note(argument)
    for key, argument in sorted({**node.kwargs, **extra}.items()):
        parts.append(key)
        note(argument)
    return tuple(parts)


def _tensor_part(val: Any, cast_to: torch.dtype | None) -> Any:
    if isinstance(val, torch.Tensor):
        dtype = cast_to if cast_to is not None and val.dtype in ir.ELIGIBLE else val.dtype
        return dtype, val.dim() == 0
    return type(val)


def _ask(
    node: fx.Node, cast_to: torch.dtype | None, extra: dict[str, Any]
) -> list[torch.dtype | None]:
    castable = set(ir.eligible_inputs(node)) if cast_to is not None else ()

    def value_of(argument: fx.Node) -> Any:
        val = argument.meta["val"]
        if cast_to is not None and argument in castable:
            return ir.retype(val, cast_to)
        return val

    target, args, kwargs = node.target, node.args, {**node.kwargs, **extra}
    if "dtype" in extra:
        target, args, kwargs = ir.call_with_dtype(node, extra["dtype"])
    args, kwargs = map_arg(args, value_of), map_arg(kwargs, value_of)
    result = _run(target, args, kwargs, node.meta["captured"])
    return [leaf.dtype if isinstance(leaf, torch.Tensor) else None for leaf in _leaves(result)]


def run_on_values(node: fx.Node) -> Any:
    """What the node yields, on fake tensors, for the values that its inputs have now."""
    args = map_arg(node.args, lambda n: n.meta["val"])
    kwargs = map_arg(node.kwargs, lambda n: n.meta["val"])
    return _run(node.target, args, kwargs, node.meta.get("val"))


def _run(target: Any, args: Any, kwargs: Any, known: Any) -> Any:
    # The Python dispatcher has the kernels that know symbolic sizes. A result whose size depends
    # on data gets a new symbol that nobody keeps.
    # A factory takes no tensor, so its own known value says which fake mode its sizes are of.
    mode = fake_mode_of(args, kwargs, known)
    shapes = getattr(mode, "shape_env", None)
    forget = shapes.ignore_fresh_unbacked_symbols() if shapes else contextlib.nullcontext()
    whole = looked_at if target in RECURRENT else contextlib.nullcontext()
    with mode, torch.no_grad(), enable_python_dispatcher(), forget, whole:
        return _call(target, args, kwargs)


def _call(target: Any, args: Any, kwargs: Any) -> Any:
    # A value that is only looked at must not be written to: mutating operators get copies.
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    return target(*args, **kwargs)


def fake_mode_of(*values: Any) -> contextlib.AbstractContextManager[Any]:
    """The fake mode of the first fake tensor among ``values``."""
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return contextlib.nullcontext()


def forget_real_tensors(*graphs: fx.GraphModule) -> None:
    """Let go of the real tensors that the fake values of graphs were made from.

    torch.utils.swap_tensors refuses a tensor that anything holds weakly.
    """
    for gm in graphs:
        mode = fake_mode_of([node.meta.get("val") for node in gm.graph.nodes])
        if isinstance(mode, FakeTensorMode):
            mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()


def _leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value)


def _with_dtypes(value: Any, dtypes: list[torch.dtype | None]) -> Any:
    leaves, spec = pytree.tree_flatten(value)
    if len(leaves) != len(dtypes):
        raise AssertionError(f"{len(leaves)} captured results, {len(dtypes)} inferred ones")
    changed = [
        ir.retype(leaf, dtype) if isinstance(leaf, torch.Tensor) and dtype is not None else leaf
        for leaf, dtype in zip(leaves, dtypes, strict=True)
    ]
    return pytree.tree_unflatten(changed, spec)
