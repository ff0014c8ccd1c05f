"""Steps that are skipped again and again: said once, with the value that is to blame."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from mpgraph.errors import PrecisionError
from mpgraph.module import state_of
from mpgraph.ranges.replay import Seeds
from mpgraph.ranges.watch import is_floating
from mpgraph.structure import flatten
from mpgraph.warn import warn

OnFloor = Literal["warn", "raise"]


class SkippedSteps:
    """Counts skipped steps in a row, where the host knows of them, and speaks up.

    The host knows where the optimizer has no kernel of its own that skips. With one, it would
    have to wait for the device: it does if it was asked to blame, or to raise.
    """

    def __init__(
        self, models: list[nn.Module], *, blame: bool, after: int, on_floor: OnFloor
    ) -> None:
        _check(after, on_floor)
        self.models, self.after, self.on_floor = models, after, on_floor
        self.waits = blame or on_floor == "raise"
        self.calls = [LastCall(model) for model in models] if blame else []
        self._row = 0
        self._said: set[str] = set()

    def note(self, skipped: bool | torch.Tensor) -> None:
        """A step is over, and its scale has not moved yet.

        Raises:
            PrecisionError: It was skipped at the floor of the scale, and ``on_floor`` is "raise".
        """
        if not self.models or (isinstance(skipped, torch.Tensor) and not self.waits):
            return
        self._row = self._row + 1 if skipped else 0
        if self._row and (self._row >= self.after or self.on_floor == "raise"):
            self._speak(self._is_at_floor())

    def _speak(self, at_floor: bool) -> None:
        if at_floor and self.on_floor == "raise":
            raise PrecisionError(self._message(at_floor))
        kind = "floor" if at_floor else "row"
        if self._row >= self.after and kind not in self._said:
            self._said.add(kind)
            warn(self._message(at_floor))

    def _is_at_floor(self) -> bool:
        # Asked of a tensor: the host waits, so not at every step.
        values = [state_of(model).scale.value for model in self.models]
        return all(not v.dynamic or float(v.scale) <= v.min_scale for v in values)

    def _message(self, at_floor: bool) -> str:
        scale = float(state_of(self.models[0]).scale.value.scale)
        times = "a step was" if self._row == 1 else f"{self._row} steps in a row were"
        where = ", which goes no lower" if at_floor else ""
        said = f"{times} skipped: a gradient is not finite at loss scale {scale:g}{where}. "
        if not self.calls:
            return said + (
                "print(mpgraph.blame(model, *inputs, loss_fn=...)) names the value that overflows, "
                "and its cure; mpgraph.guard(..., blame=True) does so here."
            )
        return said + " ".join(text for call in self.calls if (text := call.blamed()))


class LastCall:
    """The last call of a model that gradients may pass through, kept to be replayed.

    Keeps its arguments and the gradients of its results alive until the next call; not what lies
    between.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.gradients: dict[int, torch.Tensor] = {}
        self.was_called = False
        state_of(model).observer = self

    def see(self, state: Any, entry: Any, args: Any, kwargs: Any) -> Any:
        """Keep the call, if it may be differentiated."""
        if not torch.is_grad_enabled():
            return entry
        self.args, self.kwargs, self.gradients, self.was_called = args, kwargs, {}, True
        return _Kept(entry, self.gradients)

    def blamed(self) -> str:
        """Replay the call with the gradients that it got, and say what overflows."""
        from mpgraph.ranges.blame import blame_step
        from mpgraph.ranges.layout import said
        from mpgraph.ranges.replay import Step

        if not self.was_called:
            return ""
        step = Step(
            self.model, lambda: self.model(*self.args, **self.kwargs), self._seeds,
            (self.args, self.kwargs),
        )  # fmt: skip
        finding = blame_step(step, try_cure=False).finding
        if finding is not None:
            return said(finding)
        if not self._are_finite():
            return (
                "The model's results are finite, and the gradients that come back to them are not: "
                "the loss, outside of the model, makes them so."
            )
        return "The last call, replayed, is finite: an earlier one, or another rank, is not."

    def _are_finite(self) -> bool:
        return all(bool(gradient.isfinite().all()) for gradient in self.gradients.values())

    def _seeds(self, result: Any) -> Seeds:
        if not self._are_finite():
            return []  # then a value of the forward pass is to blame, or the loss
        leaves = _floating_leaves(result)
        return [(leaves[index], gradient) for index, gradient in self.gradients.items()]


class _Kept:
    """Runs a call, and keeps the gradients of its results when they come."""

    def __init__(self, entry: Any, gradients: dict[int, torch.Tensor]) -> None:
        self.entry, self.gradients = entry, gradients

    def run_call(self, *call: Any) -> Any:
        """Run it."""
        result = self.entry.run_call(*call)
        for index, leaf in enumerate(_floating_leaves(result)):
            if leaf.requires_grad:
                leaf.register_hook(lambda g, i=index: self.gradients.__setitem__(i, g))
        return result


def _floating_leaves(result: Any) -> list[Any]:
    return [v for v in flatten(result)[0] if isinstance(v, torch.Tensor) and is_floating(v)]


def _check(after: int, on_floor: str) -> None:
    if on_floor not in ("warn", "raise"):
        raise PrecisionError(f"on_floor must be 'warn' or 'raise', found {on_floor!r}")
    if after < 1:
        raise PrecisionError(f"blame_after must be a number of steps from 1, found {after}")
