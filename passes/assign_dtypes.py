"""Decide in which dtype every node runs, and write the reason beside it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from mpgraph import ir
from mpgraph.errors import PolicyError
from mpgraph.infer import DtypeInference
from mpgraph.op_table import Rule, rule_for
from mpgraph.pipeline import PassContext, graph_pass
from mpgraph.policy import RuleChoice
from mpgraph.recurrent import RECURRENT

_OFF = ir.Decision(
    Rule.FOLLOW, None, "inside the model's own autocast(enabled=False)", "the model's own region"
)
_NOT_OURS = ir.Decision(Rule.KEEP, None, "not a tensor operator", "structure")
_BRANCHES = ir.Decision(Rule.KEEP, None, "its branches take what arrives", "structure")
_BORDER = ir.Decision(
    Rule.KEEP, None, "both sides of a sub-graph's border have one dtype", "structure"
)

_aten = torch.ops.aten
# These take one dtype only, and say so when they run, but not on fake tensors.
_UNCHECKED = frozenset(
    {
        *(_aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default),
        *(_aten.index_copy.default, _aten.index_copy_.default),
        *(_aten.index_add.default, _aten.index_add_.default),
        *(_aten.index_reduce.default, _aten.index_reduce_.default),
        *(_aten.put.default, _aten.put_.default, _aten.heaviside.default, _aten.heaviside_.default),
        _aten.addmm_.default,
    }
)


@graph_pass(numerics="rounds", whole=True)
def assign_dtypes(graph: fx.Graph, context: PassContext) -> int:
    """Give every operator a :class:`~mpgraph.ir.Decision` and the value that it then yields.

    ``linear(x: fp32, w: fp32): fp32`` becomes ``linear(x: fp32, w: fp32): bf16`` with the
    decision "lower to bf16": the casts that make it true are the next pass's work. A node
    whose inputs have no dtype that a rule may change (integers, float64) is left alone.

    Sub-graphs are entered. The branches of a ``cond`` take what arrives; every other body (a
    ``while_loop``, whose results are its next inputs) takes the dtypes that it was captured
    with. All of them return the dtypes that they were captured with; the wider one, where the
    branches of a ``cond`` differ.
    """
    return _Assigner(context).assign(graph)


class _Assigner:
    def __init__(self, context: PassContext) -> None:
        self.context = context
        self.infer = DtypeInference()
        self.depth = 0

    def assign(self, graph: fx.Graph) -> int:
        edits = 0
        for node in graph.nodes:
            if node.op == "call_function":
                edits += self._assign_node(graph, node)
        return edits

    def _assign_node(self, graph: fx.Graph, node: fx.Node) -> int:
        before = (node.meta.get("decision"), _dtypes(node.meta.get("val")))
        if ir.is_operator(node):
            self._assign_operator(node)
        elif ir.is_getitem(node):
            source, index = node.args
            node.meta["val"] = source.meta["val"][index]  # type: ignore[union-attr]
        elif ir.is_higher_order(node):
            return self._assign_bodies(graph, node) + int(before[0] != node.meta["decision"])
        else:
            node.meta["decision"] = _NOT_OURS
        return int(before != (node.meta.get("decision"), _dtypes(node.meta.get("val"))))

    def _assign_bodies(self, graph: fx.Graph, node: fx.Node) -> int:
        calls = list(ir.body_calls(graph, node))
        is_cond = node.target is torch.ops.higher_order.cond
        if not calls:
            node.meta["decision"] = _NOT_OURS
            return 0
        node.meta["decision"] = _BRANCHES if is_cond else _operands_as_captured(node)
        edits = 0
        for body, operands in calls:
            if is_cond and operands is not None:
                edits += _pass_dtypes(body.graph, operands)
            self.depth += 1
            edits += self.assign(body.graph)
            self.depth -= 1
        _return_as_captured([body.graph.output_node() for body, _ in calls], is_cond)
        if is_cond:
            _yield_what_branches_return(node, calls[0][0].graph.output_node())
        return edits

    def _assign_operator(self, node: fx.Node) -> None:
        decision = self._decide(node)
        if node.target in _UNCHECKED:
            decision = _one_dtype(node, decision) or decision
        try:
            value = self._value(node, decision)
        except RuntimeError:
            # Some operators take one dtype only (index_put, scatter), and the policy has
            # widened one of their inputs, but not another.
            if (harmonised := _one_dtype(node, decision)) is None:
                raise
            decision, value = harmonised, self._value(node, harmonised)
        node.meta["decision"], node.meta["val"] = decision, value

    def _decide(self, node: fx.Node) -> ir.Decision:
        region = ir.region_of(node)
        if region is not None and not region.enabled:
            return _OFF
        compute = self.context.compute if region is None else region.dtype
        choice = self._choose(node)
        if choice.rule is Rule.REFUSE and compute is not None:
            raise PolicyError(_refusal(node, choice))
        return _decision(node, choice, compute)

    def _choose(self, node: fx.Node) -> RuleChoice:
        name = ir.operator_name(node)
        try:
            return self.context.policy.choose(name, ir.module_path(node), node.name)
        except PolicyError as error:
            raise PolicyError(
                f"{error}\n  node: {node.name}, from {ir.source_line(node)}"
            ) from None

    def _value(self, node: fx.Node, decision: ir.Decision) -> Any:
        captured = node.meta["captured"]
        if captured is None or self._ran_so_at_capture(node, decision):
            return captured
        extra = {} if decision.argument is None else {"dtype": decision.argument}
        return self.infer.result(node, decision.dtype, extra)

    def _ran_so_at_capture(self, node: fx.Node, decision: ir.Decision) -> bool:
        """Whether torch.autocast, during the capture, ran the node as it is to run now."""
        if self.depth:
            return False  # torch.export does not see the model's own regions inside branches
        inputs = node.all_input_nodes
        if any(_dtypes(n.meta.get("val")) != _dtypes(n.meta.get("captured")) for n in inputs):
            return False
        if self.context.compute is None:
            return decision.dtype is None and decision.argument is None
        row = rule_for(f"autocast-{self.context.device}", ir.operator_name(node))
        if row is None or node.target in RECURRENT:
            return False  # it may hide operators that torch.autocast did cast
        return self._captured_run_dtype(node, row.rule) == (decision.dtype or decision.argument)

    def _captured_run_dtype(self, node: fx.Node, rule: Rule) -> torch.dtype | None:
        region = ir.region_of(node)
        compute = self.context.compute if region is None else region.dtype
        return _run_dtype(rule, compute, _eligible_dtypes(node))


def _pass_dtypes(body: fx.Graph, operands: tuple[Any, ...]) -> int:
    """Give the placeholders of a body the dtypes of what the caller passes."""
    edits = 0
    for inner, outer in zip(body.find_nodes(op="placeholder"), operands, strict=True):
        dtype = ir.dtype_of(outer) if isinstance(outer, fx.Node) else None
        if dtype is not None and dtype is not ir.dtype_of(inner):
            inner.meta["val"] = ir.retype(inner.meta["val"], dtype)
            edits += 1
    return edits


def _operands_as_captured(node: fx.Node) -> ir.Decision:
    return dataclasses.replace(_BORDER, each=tuple(_captured_dtypes(node)))


def _captured_dtypes(node: fx.Node) -> list[torch.dtype | None]:
    """For each node among the arguments: its dtype at capture, if a rule may have changed it."""
    captured = [n.meta.get("captured") for n in ir.argument_nodes(node)]
    dtypes = [v.dtype if isinstance(v, torch.Tensor) else None for v in captured]
    return [d if d in ir.ELIGIBLE else None for d in dtypes]


def _return_as_captured(outputs: list[fx.Node], agree: bool) -> None:
    each = [_captured_dtypes(output) for output in outputs]
    if agree:
        same = [_widest(d for d in dtypes if d) for dtypes in zip(*each, strict=True)]
        each = [same] * len(outputs)
    for output, dtypes in zip(outputs, each, strict=True):
        output.meta["decision"] = dataclasses.replace(_BORDER, each=tuple(dtypes))


def _yield_what_branches_return(node: fx.Node, output: fx.Node) -> None:
    # torch.export computes the value of a cond without autocast inside some composites.
    leaves, spec = pytree.tree_flatten(node.meta["val"])
    dtypes = output.meta["decision"].each
    if len(dtypes) == len(leaves):
        changed = [ir.retype(v, d) if d else v for v, d in zip(leaves, dtypes, strict=True)]
        node.meta["val"] = pytree.tree_unflatten(changed, spec)


def _dtypes(value: Any) -> tuple[torch.dtype, ...]:
    if isinstance(value, torch.Tensor):
        return (value.dtype,) if value.dtype.is_floating_point else ()
    if isinstance(value, (list, tuple)):
        return tuple(d for item in value for d in _dtypes(item))
    return ()


def _decision(node: fx.Node, choice: RuleChoice, compute: torch.dtype | None) -> ir.Decision:
    decide = functools.partial(ir.Decision, choice.rule, reason=choice.reason, source=choice.source)
    inputs = _eligible_dtypes(node)
    dtype = _run_dtype(choice.rule, _lowered(choice, compute), inputs)
    if dtype is None or not inputs or ir.is_mutating(node):
        return decide(dtype=None)
    for statistics in ir.running_statistics(node):
        # The kernel wants weights in the dtype of the running statistics that it writes to.
        if (stored := ir.dtype_of(statistics)) is not dtype:
            return decide(dtype=stored, reason="in the dtype of its own running statistics")
    if choice.set_dtype or choice.append_dtype:
        return decide(dtype=None, argument=None if _has_dtype(node) else dtype)
    return decide(dtype=dtype)


def _lowered(choice: RuleChoice, compute: torch.dtype | None) -> torch.dtype | None:
    """The dtype of a LOWER: the model's own, unless the choice names another.

    What an override names holds in a float32 model too; a preset lowers nothing there.
    """
    if choice.dtype is None or (compute is None and choice.source.startswith("preset")):
        return compute
    return ir.LONG_NAMES[choice.dtype]


def _one_dtype(node: fx.Node, decision: ir.Decision) -> ir.Decision | None:
    """Run in the dtype of what is written to, else in the widest one; None if all are equal."""
    dtypes = _eligible_dtypes(node)
    if decision.dtype is not None or len(set(dtypes)) < 2:
        return None
    reason = f"torch takes one dtype here; {decision.reason}"
    dtype = dtypes[0] if ir.is_mutating(node) else _widest(dtypes)
    return dataclasses.replace(decision, rule=Rule.PROMOTE, dtype=dtype, reason=reason)


def _eligible_dtypes(node: fx.Node) -> list[torch.dtype]:
    return [d for n in ir.eligible_inputs(node) if (d := ir.dtype_of(n)) is not None]


def _run_dtype(
    rule: Rule, compute: torch.dtype | None, inputs: Iterable[torch.dtype]
) -> torch.dtype | None:
    if rule is Rule.LOWER:
        return compute
    if rule is Rule.WIDEN:
        return torch.float32
    return _widest(inputs) if rule is Rule.PROMOTE else None


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    widest = None
    for dtype in dtypes:
        widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return widest


def _has_dtype(node: fx.Node) -> bool:
    own = (*node.args, node.kwargs.get("dtype"))
    return any(isinstance(argument, torch.dtype) for argument in own)


def _refusal(node: fx.Node, choice: RuleChoice) -> str:
    return (
        f"{ir.operator_name(node)} (node {node.name!r}) may not run in 16 bit: {choice.reason}.\n"
        f"  from: {ir.source_line(node)}\n"
        "Use binary_cross_entropy_with_logits, which is safe, or pin the operator with "
        f"policy.pin(node={node.name!r}, run='fp32')."
    )
