"""``calibrate``: a policy from the ranges that some batches need."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import nn

from mpgraph import ir
from mpgraph.capture.captured import Slot
from mpgraph.conversion import convert
from mpgraph.errors import MPGraphError
from mpgraph.loss_scale import LossScale
from mpgraph.module import MixedPrecision, state_of
from mpgraph.policy import Override, Policy
from mpgraph.precision import logger
from mpgraph.ranges.cure import pins, with_pins
from mpgraph.ranges.layout import number, percent
from mpgraph.ranges.records import FP16_MAX, Spread
from mpgraph.ranges.replay import Seeds, Step, Trace, checked_loss, loss_in, replay
from mpgraph.ranges.trail import Spot, is_half

_Key = tuple[str, str, str]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    *,
    steps: int | None = None,
    policy: Policy | str | Mapping[str, Any] | os.PathLike[str] = "default",
    margin: float = 4.0,
    max_lost: float = 0.01,
    progress: bool | None = None,
) -> Policy:
    """Return ``policy`` with pins to fp32 for what would overflow or vanish in fp16.

    Runs forward and backward of each batch in fp32, on the graph of the fp16 model, and keeps the
    range of every value and gradient that fp16 would have to hold. A value is pinned if, ``margin``
    times as large, it would overflow, or if too much of it would vanish; a gradient likewise, at
    the loss scale that needs the fewest pins. The evidence is each pin's ``reason``, which
    ``Policy.save`` writes beside it. Give the scale, which the reasons and the log name, to
    :func:`mpgraph.guard`.

    No optimizer steps: the model, ``.grad``, buffers and random states stay as they are.

    Args:
        model: Any model in the mode in which it trains, converted or not.
        batches: Batches, as the training loop gets them.
        loss_fn: Called as ``loss_fn(model, batch)``, returns a tensor with one element. It must
            call the model that it is given. Without it, the model is called with the batch (a
            mapping's items by name, a tuple's or list's in order), and must return its loss.
        steps: How many batches to take; all by default.
        policy: What to start from, as for :func:`mpgraph.convert`.
        margin: How much larger than on these batches values may become.
        max_lost: The part of a tensor's sum of magnitudes that may round to 0.
        progress: Show a progress bar; by default, on a terminal.

    Raises:
        MPGraphError: There is no batch, or the loss is not one number.
        CaptureError: The model cannot be captured.

    Example:
        >>> import mpgraph, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> _ = torch.nn.init.constant_(model[0].weight, 5e4)
        >>> batches = [torch.ones(3, 4), torch.ones(3, 4)]
        >>> print(mpgraph.calibrate(model, batches, lambda model, x: model(x).mean() * 1e-4))
        default; module=0 run=fp32; module=1 run=fp32
    """
    start = Policy.coerce(policy)
    twin = _twin(model, start)
    ranges = _Ranges(twin)
    for batch in _shown(batches, steps, progress):
        ranges.add(_replayed(twin, batch, loss_fn))
    if not ranges.batches:
        raise MPGraphError("calibrate was given no batch: batches is empty, or steps is 0")
    scale = ranges.best_scale(margin, max_lost)
    result = with_pins(start, ranges.pins(start, scale, margin, max_lost))
    logger.info(
        "calibrated on %d batches: %d pins; guard the optimizer with scale=%s",
        ranges.batches, len(result.overrides) - len(start.overrides), number(scale),
    )  # fmt: skip
    return result


def _twin(model: nn.Module, policy: Policy) -> nn.Module:
    """The model in fp16, sharing its parameters; not for training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = convert(model, "fp16", policy=policy, capture=_engine(model))
    state_of(twin).scale.is_guarded = True
    return twin


def _engine(model: nn.Module) -> str:
    return state_of(model).settings.capture if isinstance(model, MixedPrecision) else "auto"


def _replayed(
    twin: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], torch.Tensor] | None
) -> Trace:
    def call() -> Any:
        return loss_fn(twin, batch) if loss_fn is not None else _called(twin, batch)

    return replay(Step(twin, call, _seeds(loss_fn is not None), (batch,)), true=True)


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _seeds(is_loss: bool) -> Callable[[Any], Seeds]:
    def seeds(result: Any) -> Seeds:
        loss = result if is_loss else loss_in(result)
        if loss is None:
            raise MPGraphError(
                "the model returns no loss: pass loss_fn, as in "
                "loss_fn=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])"
            )
        return [(checked_loss(loss), None)]

    return seeds


@contextlib.contextmanager
def _bar(progress: bool | None) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = console.is_terminal if progress is None else progress
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not shown) as bar:
        yield bar


def _shown(batches: Iterable[Any], steps: int | None, progress: bool | None) -> Iterator[Any]:
    """The first batches, with a progress bar."""
    total = len(batches) if isinstance(batches, Sized) else None
    total = min((n for n in (total, steps) if n is not None), default=None)
    with _bar(progress) as bar:
        task = bar.add_task("calibrating", total=total)
        for batch in itertools.islice(batches, steps):
            yield batch
            bar.advance(task)


@dataclasses.dataclass
class _Seen:
    """What all batches have shown of one 16-bit value."""

    spot: Spot
    forward: Spread
    gradient: Spread | None = None


class _Ranges:
    """The ranges of every 16-bit value, over all batches."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.batches = 0
        self._seen: dict[_Key, _Seen] = {}

    def add(self, trace: Trace) -> None:
        """Add what one batch has shown."""
        self.batches += 1
        for run in trace.runs:
            for node, forward in run.forward.items():
                if is_half(node):
                    key = (ir.operator_name(node), ir.module_path(node), node.name)
                    seen = self._seen.setdefault(key, _Seen((run, node), Spread(0)))
                    seen.forward = seen.forward.merged(forward)
                    if node in run.gradient:
                        seen.gradient = run.gradient[node].merged(seen.gradient)

    def best_scale(self, margin: float, max_lost: float) -> float:
        """The scale at which the fewest gradients overflow or vanish; of several, the largest."""
        candidates = [2.0**e for e in range(24, -15, -1)]
        assert (candidates[0], candidates[-1]) == (LossScale.max_scale, LossScale.min_scale)
        gradients = [seen.gradient for seen in self._seen.values() if seen.gradient is not None]

        def misfits(scale: float) -> int:
            return sum(bool(_misfit(g, scale, margin, max_lost)) for g in gradients)

        return min(candidates, key=misfits)

    def pins(self, policy: Policy, scale: float, margin: float, max_lost: float) -> list[Override]:
        """What must be in fp32, each with its evidence."""
        evidence: dict[Override, list[tuple[float, str]]] = collections.defaultdict(list)
        for seen in self._seen.values():
            for said in self._said(seen, scale, margin, max_lost):
                for override in pins([seen.spot], self.model, policy):
                    evidence[override].append(said)
        whole = {override.module for override in evidence if override.op is None}
        kept = [o for o in evidence if o.op is None or o.module not in whole]
        return [dataclasses.replace(o, reason=_joined(evidence[o], self.batches)) for o in kept]

    def _said(
        self, seen: _Seen, scale: float, margin: float, max_lost: float
    ) -> Iterator[tuple[float, str]]:
        _, node = seen.spot
        slot: Slot | None = node.meta.get("slot")
        name = slot.target if slot is not None else node.name
        if misfit := _misfit(seen.forward, 1.0, margin, max_lost):
            yield seen.forward.largest, f"{name}: value {misfit}"
        if seen.gradient is not None and (
            misfit := _misfit(seen.gradient, scale, margin, max_lost)
        ):
            yield (
                seen.gradient.largest * scale,
                f"{name}: gradient {misfit} at scale {number(scale)}",
            )


def _misfit(spread: Spread, scale: float, margin: float, max_lost: float) -> str:
    """Why fp16 does not hold these values; "" if it does."""
    if spread.bad:
        return f"infinite or NaN in fp32 ({spread.bad} of {spread.count})"
    if spread.largest * scale * margin >= FP16_MAX:
        return f"up to {number(spread.largest)}"
    if spread.lost(scale) > max_lost:
        return f"at most {number(spread.largest)}, {percent(spread.vanishing(scale))} vanish"
    return ""


def _joined(evidence: list[tuple[float, str]], batches: int) -> str:
    """The most extreme evidence, and how much there is besides it."""
    texts = [text for _, text in sorted(evidence, key=lambda e: -e[0])]
    more = f", and {len(texts) - 1} more" if len(texts) > 1 else ""
    return f"{texts[0]}{more} ({batches} batches)"
