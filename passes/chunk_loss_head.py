"""Compute a final linear layer and its cross-entropy in chunks of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mpgraph import ir
from mpgraph.errors import CaptureError
from mpgraph.pipeline import graph_pass
from mpgraph.step.joint import StepContext, append, copied_as
from mpgraph.step.loss_head import Change, LossHead, NoLossHead, loss_heads

aten = torch.ops.aten
_SUM = 2  # at::Reduction


@graph_pass(numerics="rounds")
def chunk_loss_head(graph: fx.Graph, context: StepContext) -> int:
    """Never hold the scores of all rows: each chunk gives its gradients before the next begins.

    ``scores = x @ w; loss = cross_entropy(scores); d = dscores(loss); dx = d @ w.T; dw = x.T @ d``
    becomes, for ``context.loss_rows`` rows at a time, the same lines on a part of x, with the
    losses and dw of the parts added up in float32, and dx joined.

    Scores and their gradient are rounded as before, row by row; what is added up is added in
    another order. On a CPU, whose products have the dtype of their factors, a part of dw is rounded
    to 16 bit before it is added, as that of a micro-batch would be. The gradients are computed for
    an upstream gradient of one, in the forward part, and multiplied by it in the backward part.

    Scores that something else reads as well are refused.
    """
    if context.loss_rows is None:
        return 0
    try:
        heads = loss_heads(graph)
        for head in heads:
            _rewrite(graph, head, context.loss_rows)
    except NoLossHead as error:
        raise CaptureError(
            f"chunk_loss_head finds no linear layer whose scores go into a cross-entropy alone: "
            f"{error}. Let the loss function return the loss only, not the scores, or leave "
            "chunk_loss_head out."
        ) from None
    return len(heads)


def _rewrite(graph: fx.Graph, head: LossHead, rows: int) -> None:
    upstream, seed = _early(graph, head)
    factors = [change for change in (*head.before, *head.after) if isinstance(change, fx.Node)]
    inputs = [head.features, head.weight, head.target, upstream, *factors]
    if head.bias is not None:
        inputs.append(head.bias)
    made = append(graph, _chunked(head, rows, factors), inputs, "forward", before=head.loss)
    for node in made:
        for key in ("module_path", "stack_trace", "decision", "nn_module_stack"):
            if key in head.scores.meta:
                node.meta.setdefault(key, head.scores.meta[key])
    loss, total, of_features, of_weight, of_bias = made
    for user in list(head.loss.users):
        user.replace_all_uses_with((loss, total)[user.args[1]])  # type: ignore[index]
    for node in head.feature_gradients:
        _put(graph, node, of_features, seed)
    for node in head.weight_gradients:
        _put(graph, node, of_weight, seed, turned=head.is_turned(node) != _is_turned(head))
    for node in head.bias_gradients:
        _put(graph, node, of_bias, seed)


def _put(
    graph: fx.Graph, old: fx.Node, new: fx.Node, seed: fx.Node | None, turned: bool = False
) -> None:
    """Put a gradient, times the upstream gradient, in the place of another."""
    like = old.meta["val"]

    def times(value: torch.Tensor, *one: torch.Tensor) -> list[torch.Tensor]:
        value = value.t() if turned else value
        for factor in one:
            value = value * factor
        # As the old one lies in memory: fused optimizers read it beside its parameter.
        value = value.view(like.shape) if value.dim() == 1 else value
        return [value if value.stride() == like.stride() else copied_as(value, like.stride())]

    inputs = [new] if seed is None else [new, seed]
    (made,) = append(graph, times, inputs, "backward", before=old)
    made.meta = {**old.meta, **made.meta}
    old.replace_all_uses_with(made)


def _chunked(
    head: LossHead, rows: int, factors: Sequence[fx.Node]
) -> Callable[..., list[torch.Tensor]]:
    """A function of tensors: loss, number of rows that count, and the three gradients."""
    turned = _is_turned(head)

    def compute(x: Any, weight: Any, target: Any, upstream: Any, *rest: Any) -> list[torch.Tensor]:
        values = dict(zip(factors, rest, strict=False))
        bias = rest[len(factors)] if head.bias is not None else None
        total = (target != head.ignored).sum().to(upstream.dtype)
        losses, of_weight, of_bias, of_features = [], _Sum(), _Sum(), []
        for part, wanted in zip(x.split(rows), target.split(rows), strict=True):
            scores = part @ weight if bias is None else torch.addmm(bias, part, weight)
            changed = _changed(scores, head.before, values)
            softmax = aten._log_softmax.default(changed, 1, False)
            loss = aten.nll_loss_forward.default(softmax, wanted, None, _SUM, head.ignored)[0]
            # The mean's own rule, with the number of all rows that count, gives the mean's bits.
            d = aten.nll_loss_backward.default(
                upstream, softmax, wanted, None, head.loss.args[3], head.ignored, total
            )
            d = aten._log_softmax_backward_data.default(d, softmax, 1, changed.dtype)
            d = _changed(d, head.after, values)
            losses.append(loss)
            of_features.append(d @ weight.t())
            of_weight.add(_product(d.t(), part) if turned else _product(part.t(), d))
            of_bias.add(d.sum(0))
        summed = torch.stack(losses).sum()
        value = summed / total if head.is_mean else summed
        joined = torch.cat(of_features)
        return [value, total, joined, of_weight.to(joined.dtype), of_bias.to(joined.dtype)]

    return compute


def _is_turned(head: LossHead) -> bool:
    """Whether the gradient of the weight is computed as (classes, width), as it was."""
    return any(map(head.is_turned, head.weight_gradients))


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A product of matrices in float32 where there is a kernel for that."""
    if left.device.type == "cuda" and left.dtype in (torch.bfloat16, torch.float16):
        return aten.mm.dtype(left, right, torch.float32)  # type: ignore[no-any-return]
    return left @ right


class _Sum:
    """Adds up tensors in float32, whatever dtype they have."""

    def __init__(self) -> None:
        self.value: Any = None

    def add(self, value: torch.Tensor) -> None:
        """Add one."""
        value = value.float()
        self.value = value if self.value is None else self.value + value

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """The sum, rounded."""
        return self.value.to(dtype)  # type: ignore[no-any-return]


def _changed(value: Any, changes: Sequence[Change], values: dict[fx.Node, Any]) -> Any:
    for change in changes:
        if isinstance(change, fx.Node):
            value = value * values[change]
        else:
            value = value.to(change)
    return value


def _early(graph: fx.Graph, head: LossHead) -> tuple[fx.Node, fx.Node | None]:
    """The gradient of the loss, computed where the loss is, and the one that it begins with."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    seeds: list[fx.Node] = []

    def copied(node: Any) -> Any:
        if not isinstance(node, fx.Node) or order[node] < order[head.loss]:
            return node
        if node.target is aten.ones_like.default:
            seeds.append(node)
            return _one(graph, node)
        if not ir.is_operator(node) or node.meta["val"].numel() != 1 or not node.all_input_nodes:
            raise NoLossHead("the gradient of the loss depends on the loss")
        args = fx.map_arg(node.args, copied)
        made = graph.call_function(node.target, args, node.kwargs)  # type: ignore[arg-type]
        made.meta = {**node.meta, "part": "forward"}
        return made

    with graph.inserting_before(head.loss):
        early = copied(head.upstream)
    return early, seeds[0] if seeds else None


def _one(graph: fx.Graph, seed: fx.Node) -> fx.Node:
    value = seed.meta["val"]
    node = graph.call_function(
        aten.full.default, ([], 1.0), {"dtype": value.dtype, "device": value.device}
    )
    node.meta = {"val": value, "part": "forward"}
    return node
