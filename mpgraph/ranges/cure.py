"""What to pin, and which loss scale to take, so that a step's values fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from torch import fx, nn

from mpgraph import ir
from mpgraph.loss_scale import LossScale
from mpgraph.op_table import MOVES_DATA, Rule, rule_for
from mpgraph.policy import Override, Policy
from mpgraph.ranges.records import FP16_MAX, Spread
from mpgraph.ranges.trail import Spot, is_half
from mpgraph.ranges.watch import Run

# The part of a gradient's sum of magnitudes that may vanish, and the part of all gradients that
# may lose more than that, before a scale counts as too low. Some gradients are nothing but noise
# (of a bias before a norm), and lose everything at any scale.
_LOSS_OF_ONE, _LOSERS = 0.01, 0.05


def pins(spots: Iterable[Spot], model: nn.Module, policy: Policy) -> list[Override]:
    """Overrides that take these 16-bit values to fp32: by who makes them, or who gets the cast."""
    found: dict[Override, None] = {}
    for run, node in spots:
        for maker in _makers(run, node):
            override = _override(maker, model, policy)
            if override is not None:
                found[override] = None
    return _without_covered(found)


def _makers(run: Run, node: fx.Node) -> Iterator[fx.Node]:
    """The operators that decide in which dtype a value is."""
    if node.op == "placeholder":
        if run.parent is not None:
            outer, call = run.parent
            for source in call.all_input_nodes:
                yield from _makers(outer, source) if is_half(source) else ()
        else:
            yield from _readers(node)
    elif ir.is_inserted(node):
        yield from _readers(node)
    elif ir.is_getitem(node) or _takes_what_comes(node):
        for source in node.all_input_nodes[:1]:
            yield from _makers(run, source)
    elif node.op == "call_function" and not ir.is_higher_order(node):
        yield node  # a body has the dtypes that it was traced with, whatever the policy


def _readers(cast: fx.Node) -> Iterator[fx.Node]:
    for user in cast.users:
        if ir.is_inserted(user) or _takes_what_comes(user):
            yield from _readers(user)
        elif user.op == "call_function" and not ir.is_higher_order(user):
            yield user


def _takes_what_comes(node: fx.Node) -> bool:
    """Whether it has the dtype of what it is given or writes to: pinning it changes nothing."""
    return ir.operator_name(node) in MOVES_DATA or ir.is_mutating(node)


def _override(node: fx.Node, model: nn.Module, policy: Policy) -> Override | None:
    """The narrowest override in words that still hold after the next capture."""
    module, operator = ir.module_path(node), ir.operator_name(node)
    row = rule_for(policy.preset, operator)
    if ir.is_cast(node) or (row is not None and row.rule is Rule.KEEP):
        return None  # the model's own cast: no policy changes it
    if not module:
        return Override(node=node.name)
    if _is_leaf(model, module):
        return Override(module=module)
    return Override(op=operator.removesuffix(".default"), module=module)


def _is_leaf(model: nn.Module, path: str) -> bool:
    try:
        return next(model.get_submodule(path).children(), None) is None
    except AttributeError:
        return False


def _without_covered(found: Iterable[Override]) -> list[Override]:
    whole = {override.module for override in found if override.op is None}
    return [o for o in found if o.op is None or o.module not in whole]


def with_pins(policy: Policy, overrides: Sequence[Override]) -> Policy:
    """The policy with these overrides after its own."""
    new = [override for override in overrides if override not in policy.overrides]
    return Policy(policy.preset, (*policy.overrides, *new), policy.on_unknown)


def best_scale(true_gradients: Iterable[Spread]) -> float | None:
    """The largest power of two that leaves the largest gradient a factor of two below fp16's end.

    Within the limits of :class:`mpgraph.LossScale`; None if even its floor is too high, or if
    there is no gradient.
    """
    largest = max((spread.largest for spread in true_gradients), default=0.0)
    if not largest:
        return None
    exponent = math.floor(math.log2(FP16_MAX / 2 / largest))
    # With a largest gradient of exactly half the end, log2 gives an integer: not below it.
    exponent -= largest * 2.0**exponent >= FP16_MAX / 2
    low, high = math.log2(LossScale.min_scale), math.log2(LossScale.max_scale)
    return None if exponent < low else float(2.0 ** min(exponent, high))


def is_too_low(scale: float, true_gradients: Sequence[Spread]) -> bool:
    """Whether too many gradients would vanish at a scale."""
    losers = sum(spread.lost(scale) > _LOSS_OF_ONE for spread in true_gradients)
    return losers > max(1.0, _LOSERS * len(true_gradients))
