"""Connectionist temporal classification: one recursion over time, run forwards and backwards.

A target ``a b`` is spelled ``- a - b -`` with blanks. ``alpha[t, s]`` is the logarithm of the
probability of all ways to have spelled up to place ``s`` at time ``t``, ``beta[t, s]`` that of all
ways to spell the rest from there; both count the probability at ``t`` itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mpgraph.onnx.lowering.row import Row

aten = torch.ops.aten


@torch.library.custom_op("mpgraph::ctc_chain", mutates_args=())
def ctc_chain(start: Tensor, found: Tensor, skips: Tensor, counts: Tensor) -> Tensor:
    """The recursion over time: ``s' = log(exp(s) + exp(s shifted 1) + exp(s shifted 2)) + found``.

    Args:
        start: ``[batch, place]``, before the first time.
        found: ``[time, batch, place]``, log-probabilities.
        skips: ``[batch, place]``, 0 where a shift by two is allowed, -inf elsewhere.
        counts: ``[time, batch, 1]``, whether this time counts; if not, nothing changes.

    Returns:
        ``[time, batch, place]``, what it is after every time.
    """
    states = []
    for now, is_counted in zip(found, counts, strict=True):
        start = torch.where(is_counted, _next(start, skips) + now, start)
        states.append(start)
    return torch.stack(states)


@ctc_chain.register_fake
def _(start: Tensor, found: Tensor, skips: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(found)


CHAIN = torch.ops.mpgraph.ctc_chain.default
"""The operator."""


def _next(state: Tensor, skips: Tensor) -> Tensor:
    size = state.shape[1]
    by = torch.nn.functional.pad(state, (2, 0), value=-torch.inf)
    ways = torch.stack([state, by[:, 1 : size + 1], by[:, :size] + skips])
    return ways.logsumexp(0)


@dataclasses.dataclass
class _Spelled:
    """Targets with blanks.

    Attributes:
        labels: ``[batch, place]``: the class at every place.
        skips: ``[batch, place]``: 0 where one may come from two places before, -inf elsewhere.
        lengths: ``[batch, 1]``: how many places there are.
    """

    labels: Tensor
    skips: Tensor
    lengths: Tensor


def _spelled(targets: Tensor, lengths: Tensor, blank: int) -> _Spelled:
    rows = targets if targets.dim() == 2 else _rows(targets, lengths)
    count = rows.shape[1]
    # What lies behind the end of a target may be anything, also no class at all.
    is_there = torch.arange(count) < lengths.unsqueeze(1)
    rows = torch.where(is_there, rows, blank).to(torch.int64)
    last = torch.full_like(lengths, blank).unsqueeze(1)
    labels = torch.cat([torch.stack([torch.full_like(rows, blank), rows], 2).flatten(1), last], 1)
    before = torch.cat([labels[:, :1], labels[:, :1], labels], 1)[:, : 2 * count + 1]
    allowed = (labels != blank) & (labels != before)
    skips = torch.where(allowed, 0.0, -torch.inf)
    return _Spelled(labels, skips, 2 * lengths.unsqueeze(1) + 1)


def _rows(targets: Tensor, lengths: Tensor) -> Tensor:
    """``[batch, all targets]``, from targets in one row: none is longer than all of them."""
    ends = lengths.cumsum(0)
    places = (ends - lengths).unsqueeze(1) + torch.arange(targets.shape[0])
    return targets[places.clamp(max=targets.shape[0] - 1)]


def _chains(
    log_probs: Tensor, spelled: _Spelled, counts: Tensor, *, backwards: bool = False
) -> Tensor:
    """``alpha``, or ``beta``."""
    steps, batch = log_probs.shape[:2]
    places = spelled.labels.shape[1]
    found = log_probs.gather(2, spelled.labels.unsqueeze(0).expand(steps, -1, -1))
    place = torch.arange(places)
    if not backwards:
        start = torch.where(place == 0, 0.0, -torch.inf).to(found.dtype)
        start = start.unsqueeze(0).expand(batch, places)
        states: Tensor = ctc_chain(start, found, spelled.skips.to(found.dtype), counts)
        return states
    start = torch.where(place == spelled.lengths - 1, 0.0, -torch.inf).to(found.dtype)
    # From s to s + 2 one may go where the way from s + 2 back allows it.
    none = torch.full_like(spelled.skips[:, :1], -torch.inf)
    skips = torch.cat([spelled.skips, none, none], 1)[:, 2:].to(found.dtype)
    given = [v.flip(-1) for v in (start, found.flip(0), skips)]
    turned: Tensor = ctc_chain(*given, counts.flip(0))
    return turned.flip(0, 2)


def _counts(log_probs: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(log_probs.shape[0]).view(-1, 1, 1) < lengths.view(1, -1, 1)


def _batched(log_probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if log_probs.dim() == 3:
        return log_probs, targets
    return log_probs.unsqueeze(1), targets.view(1, -1)


def _loss_of(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[Tensor, Tensor]:
    wide, rows = _batched(log_probs, targets)
    steps, sizes = _lengths(input_lengths), _lengths(target_lengths)
    spelled = _spelled(rows, sizes, blank)
    alpha = _chains(wide, spelled, _counts(wide, steps))
    last = spelled.lengths - 1
    places = torch.cat([last, (last - 1).clamp(min=0)], 1)
    ends = alpha[-1].gather(1, places)
    # A target without classes has one end: the blank.
    ends = torch.where((torch.arange(2) == 0) | (last > 0), ends, -torch.inf)
    loss = -ends.logsumexp(1)
    known = alpha.transpose(0, 1)
    return (loss, known) if log_probs.dim() == 3 else (loss.squeeze(0), known.squeeze(0))


def _lengths(given: Any) -> Tensor:
    if isinstance(given, Tensor):
        return given.reshape(-1).to(torch.int64)
    return torch.tensor([*given], dtype=torch.int64)


def _backward(
    grad: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    loss: Tensor,
    alpha: Tensor,
    blank: int,
    zero_infinity: bool = False,
) -> Tensor:
    wide, rows = _batched(log_probs, targets)
    counts = _counts(wide, _lengths(input_lengths))
    spelled = _spelled(rows, _lengths(target_lengths), blank)
    beta = _chains(wide, spelled, counts, backwards=True)
    known = (alpha if log_probs.dim() == 3 else alpha.unsqueeze(0)).transpose(0, 1)
    labels = spelled.labels.unsqueeze(0).expand(wide.shape[0], -1, -1)
    both = known + beta
    losses, scale = loss.reshape(1, -1, 1), grad.reshape(1, -1, 1)
    # Of all ways, the share that is at this place at this time.
    share = (both + losses - wide.gather(2, labels)).exp()
    share = torch.where((both == -torch.inf) & (losses != torch.inf), 0.0, share)
    shares = torch.zeros_like(wide).scatter_add(2, labels, share)
    # Where nothing spells the target, no gradient is right.
    found = torch.where(losses == torch.inf, torch.nan, (wide.exp() - shares) * scale)
    is_none = ~counts | (losses == torch.inf) if zero_infinity else ~counts
    found = torch.where(is_none, 0.0, found)
    return found if log_probs.dim() == 3 else found.squeeze(1)


_SOURCE = (
    "Graves et al., Connectionist temporal classification, ICML 2006, equations 6 to 16; "
    "aten/src/ATen/native/LossCTC.cpp"
)

ROWS = (
    Row(
        (aten._ctc_loss.default, aten._ctc_loss.Tensor), _loss_of,
        "-log(alpha[T, end] + alpha[T, end - 1]), alpha by a Scan over time", _SOURCE,
    ),
    Row(
        (aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor), _backward,
        "exp(y) - sum over the places of a class of alpha * beta / (y * exp(-loss)), beta by a "
        "Scan over time backwards", _SOURCE,
    ),
)  # fmt: skip
