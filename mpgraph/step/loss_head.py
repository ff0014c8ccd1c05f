"""Where a step's graph computes a linear layer and the cross-entropy of what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx

from mpgraph import ir

aten = torch.ops.aten

_VIEWS = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.alias.default, aten.detach.default}
)
_LINEAR = frozenset({aten.mm.default, aten.addmm.default})
# What may happen to the scores and to their gradient, row by row.
_ROW_BY_ROW = _VIEWS | {
    aten._to_copy.default,
    aten.t.default,
    aten.mul.Tensor,
    aten._log_softmax.default,
    aten._log_softmax_backward_data.default,
    aten.nll_loss_forward.default,
    aten.nll_loss_backward.default,
}
_MEAN, _SUM = 1, 2  # at::Reduction


class NoLossHead(Exception):
    """There is no such place, or it does something that cannot be done in chunks: what."""


# What is done to a value, row by row: a conversion to a dtype, or a product with a number.
Change = torch.dtype | fx.Node


@dataclasses.dataclass(frozen=True)
class LossHead:
    """A linear layer whose scores go into a cross-entropy and nowhere else.

    Attributes:
        scores: ``mm`` or ``addmm``, of shape (rows, classes).
        features: What it reads, (rows, width).
        weight: Its weight, (width, classes).
        bias: (classes), if it has one.
        before: What is done to the scores before the log-softmax.
        loss: The ``nll_loss_forward``.
        target: (rows), integers.
        upstream: The gradient of the loss.
        after: What is done to the gradient of the log-softmax.
        feature_gradients: The nodes that compute the gradient of ``features``.
        weight_gradients: Those of ``weight``, (width, classes), or turned, (classes, width).
        bias_gradients: Those of ``bias``, (classes) or (1, classes).
    """

    scores: fx.Node
    features: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    before: tuple[Change, ...]
    loss: fx.Node
    target: fx.Node
    upstream: fx.Node
    after: tuple[Change, ...]
    feature_gradients: tuple[fx.Node, ...]
    weight_gradients: tuple[fx.Node, ...]
    bias_gradients: tuple[fx.Node, ...]

    @property
    def is_mean(self) -> bool:
        """Whether the loss is the mean over rows, not their sum."""
        return bool(self.loss.args[3] == _MEAN)

    @property
    def ignored(self) -> int:
        """The target of rows that do not count."""
        return cast(int, self.loss.args[4])

    def is_turned(self, gradient: fx.Node) -> bool:
        """Whether a gradient of the weight is of shape (classes, width)."""
        return tuple(gradient.meta["val"].shape) != tuple(self.weight.meta["val"].shape)


def loss_heads(graph: fx.Graph) -> list[LossHead]:
    """All such places.

    Raises:
        NoLossHead: There is none, or one is not of this kind; says why.
    """
    losses = list(graph.find_nodes(op="call_function", target=aten.nll_loss_forward.default))
    if not losses:
        raise NoLossHead("the step computes no cross-entropy over classes in the last dimension")
    return [_head(loss) for loss in losses]


def _head(loss: fx.Node) -> LossHead:
    softmax = _origin(_node(loss, 0), _VIEWS)
    if softmax.target is not aten._log_softmax.default:
        raise NoLossHead(f"the loss reads {_told(softmax)}, not a log-softmax")
    scores = _origin(_node(softmax, 0), _VIEWS | {aten._to_copy.default})
    if scores.target not in _LINEAR:
        raise NoLossHead(f"the log-softmax reads {_told(scores)}, not a linear layer's scores")
    if loss.args[2] is not None:
        raise NoLossHead("the cross-entropy has class weights")
    if loss.args[3] not in (_MEAN, _SUM):
        raise NoLossHead("the cross-entropy is not reduced to one number")
    bias, features, weight = _operands(scores)
    region = _region(scores)
    (softmax_gradient,) = _only(region, aten._log_softmax_backward_data.default)
    (loss_gradient,) = _only(region, aten.nll_loss_backward.default)
    ends = [u for n in region for u in n.users if u not in region and not ir.is_getitem(u)]
    ends = list(dict.fromkeys(ends))
    products = [n for n in ends if n.target is aten.mm.default]
    gradient = _gradient(products, region)
    of_features = tuple(n for n in products if _is_of_features(n, region, weight))
    of_weight = tuple(n for n in products if n not in of_features)
    for node in of_weight:
        _check_weight_gradient(node, region, features)
    return LossHead(
        scores, features, weight, bias, _changes(_node(softmax, 0), scores), loss, _node(loss, 1),
        _node(loss_gradient, 0), _changes(gradient, softmax_gradient),
        of_features, of_weight, tuple(n for n in ends if n not in products),
    )  # fmt: skip


def _node(node: fx.Node, index: int) -> fx.Node:
    return cast(fx.Node, node.args[index])


def _told(node: fx.Node) -> str:
    line = ir.source_line(node)
    return f"{ir.operator_name(node)}" + (f" ({line})" if line else "")


def _origin(node: fx.Node, passing: frozenset[Any] | set[Any]) -> fx.Node:
    """What a value was before some operators of one input."""
    while node.target in passing:
        node = _node(node, 0)
    return node


def _operands(scores: fx.Node) -> tuple[fx.Node | None, fx.Node, fx.Node]:
    operands = cast("tuple[fx.Node, ...]", scores.args)
    return (None, *operands) if len(operands) == 2 else (operands[0], operands[1], operands[2])


def _region(scores: fx.Node) -> dict[fx.Node, None]:
    """The scores and all that is computed from them row by row."""
    region = {scores: None}
    for node in (queue := [scores]):
        for user in node.users:
            if user in region or _is_end(user):
                continue
            if user.target not in _ROW_BY_ROW:
                raise NoLossHead(f"the scores are also read by {_told(user)}")
            region[user] = None
            queue.append(user)
    return region


def _is_end(user: fx.Node) -> bool:
    """Whether the node adds over rows, or turns a gradient of scores into one of features."""
    ends = (aten.mm.default, aten.sum.dim_IntList)
    return user.target in ends or ir.is_getitem(user)


def _only(region: dict[fx.Node, None], target: Any) -> list[fx.Node]:
    found = [node for node in region if node.target is target]
    if len(found) != 1:
        raise NoLossHead(f"{len(found)} nodes compute {target}, where one was expected")
    return found


def _is_of_features(product: fx.Node, region: dict[fx.Node, None], weight: fx.Node) -> bool:
    """Whether this is the gradient of the scores, times the weight."""
    left, right = _node(product, 0), _node(product, 1)
    return left in region and right not in region and _is_turn_of(right, weight)


def _check_weight_gradient(
    product: fx.Node, region: dict[fx.Node, None], features: fx.Node
) -> None:
    """Refuse a product that is not one of the gradient of the scores and the features."""
    left, right = _node(product, 0), _node(product, 1)
    same = (left in region and _is_same(right, features)) or (
        right in region and _is_turn_of(left, features)
    )
    if not same:
        raise NoLossHead(f"the gradient of the scores is also read by {_told(product)}")


def _turns(node: fx.Node) -> tuple[fx.Node, bool]:
    """Where a matrix comes from, and whether it has been transposed since."""
    turned = False
    while node.target in (aten.t.default, aten.detach.default, aten.alias.default):
        turned ^= node.target is aten.t.default
        node = _node(node, 0)
    return node, turned


def _is_same(one: fx.Node, other: fx.Node) -> bool:
    return _turns(one) == _turns(other)


def _is_turn_of(one: fx.Node, other: fx.Node) -> bool:
    (a, turned), (b, other_turned) = _turns(one), _turns(other)
    return a is b and turned is not other_turned


def _gradient(products: Sequence[fx.Node], region: dict[fx.Node, None]) -> fx.Node:
    """The gradient of the scores, as products read it."""
    if not products:
        raise NoLossHead("neither the layer nor what it reads is trained")
    return next(n for n in cast("tuple[fx.Node, ...]", products[0].args) if n in region)


def _changes(node: fx.Node, start: fx.Node) -> tuple[Change, ...]:
    """What is done to ``start`` on the way to ``node``."""
    return tuple(reversed(list(_changes_back(node, start))))


def _changes_back(node: fx.Node, start: fx.Node) -> Iterator[Change]:
    while node is not start:
        if node.target is aten._to_copy.default:
            yield node.meta["val"].dtype
        elif node.target is aten.mul.Tensor:
            factor = _node(node, 1)
            if not isinstance(factor, fx.Node) or factor.meta["val"].numel() != 1:
                raise NoLossHead(f"the gradient of the scores is changed by {_told(node)}")
            yield factor
        elif node.target not in _VIEWS | {aten.t.default}:
            raise NoLossHead(f"the scores are changed by {_told(node)}")
        node = _node(node, 0)
