"""The loss scale as a value, and the rule that moves it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from mpgraph.errors import PrecisionError

_TENSOR = {"tensor": True}


@dataclasses.dataclass(frozen=True, eq=False)
class LossScale:
    """The loss scale and the rule that moves it.

    Gradients in fp16 are kept ``scale`` times as large as they are, so that small ones do not
    vanish. After ``growth_interval`` finite steps in a row the scale grows; at the
    ``hysteresis``-th non-finite step in a row, and at every one after it, it backs off. With
    ``dynamic=False`` it stays. Every factor is a power of two: multiplying by one changes no
    digit of a gradient, so scaling in and out leaves it as it was.

    Attributes:
        init_scale: The first scale.
        growth_factor: What the scale is multiplied by when it grows.
        backoff_factor: What the scale is multiplied by when it backs off.
        growth_interval: Finite steps in a row before the scale grows.
        hysteresis: Non-finite steps in a row before the scale backs off.
        min_scale: The scale never backs off below this.
        max_scale: The scale never grows beyond this.
        dynamic: Whether the scale moves at all.
        scale: The scale now, a tensor without dimensions on the model's device.
        growth_tracker: Finite steps in a row so far.
        hysteresis_tracker: Counts down from ``hysteresis`` with non-finite steps in a row; the
            scale backs off at every one that leaves 0 or less.

    Raises:
        PrecisionError: A factor is not a power of two, or the numbers do not fit each other.
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    hysteresis: int = 1
    min_scale: float = 2.0**-14
    max_scale: float = 2.0**24
    dynamic: bool = True
    scale: torch.Tensor = dataclasses.field(default=None, metadata=_TENSOR)  # type: ignore[assignment]
    growth_tracker: torch.Tensor = dataclasses.field(default=None, metadata=_TENSOR)  # type: ignore[assignment]
    hysteresis_tracker: torch.Tensor = dataclasses.field(default=None, metadata=_TENSOR)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        _check(self)
        start = {
            "scale": torch.tensor(self.init_scale, dtype=torch.float32),
            "growth_tracker": torch.zeros((), dtype=torch.int32),
            "hysteresis_tracker": torch.tensor(self.hysteresis, dtype=torch.int32),
        }
        for name, value in start.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def next(self, found_inf: torch.Tensor) -> LossScale:
        """The scale after a step whose gradients were finite (0) or not (1), without a sync.

        Every tensor of the result is a new one: what a backward pass has saved stays as it was.
        """
        if not self.dynamic:
            return self
        found = found_inf.to(self.scale.device, torch.float32)
        scale, tracker = self.scale.clone(), self.growth_tracker.clone()
        torch._amp_update_scale_(
            scale, tracker, found, self.growth_factor, self.backoff_factor, self.growth_interval
        )
        scale.clamp_(self.min_scale, self.max_scale)
        if self.hysteresis == 1:
            return _rebuilt(self, {"scale": scale, "growth_tracker": tracker})
        left = torch.where(found > 0, self.hysteresis_tracker - 1, self.hysteresis)
        tolerated = (found > 0) & (left > 0)
        tensors = {
            "scale": torch.where(tolerated, self.scale, scale),
            "growth_tracker": tracker,
            "hysteresis_tracker": left.to(torch.int32),
        }
        return _rebuilt(self, tensors)

    def moved(
        self,
        found_inf: torch.Tensor,
        scale: torch.Tensor,
        growth_tracker: torch.Tensor,
        hysteresis_tracker: torch.Tensor,
    ) -> list[torch.Tensor]:
        """The rule of :meth:`next` on these three tensors, in operators that a graph can hold.

        The rule of ``torch._amp_update_scale_`` (aten/src/ATen/native/cuda/AmpKernels.cu), within
        the floor and the ceiling, and with the hysteresis.
        """
        found = found_inf > 0
        left, lower = hysteresis_tracker, scale * self.backoff_factor
        if self.hysteresis > 1:
            left = torch.where(found, hysteresis_tracker - 1, self.hysteresis)
            lower = torch.where(left > 0, scale, lower)
        counted = growth_tracker + 1
        grown = scale * self.growth_factor
        grows = (counted == self.growth_interval) & grown.isfinite()
        finite = torch.where(grows, grown, scale)
        tracker = torch.where(found | (counted == self.growth_interval), 0, counted)
        return [
            torch.where(found, lower, finite).clamp(self.min_scale, self.max_scale),
            tracker.to(torch.int32),
            left.to(torch.int32),
        ]

    def to(self, device: torch.device | str) -> LossScale:
        """The same value with its tensors on another device."""
        return _rebuilt(self, {name: getattr(self, name).to(device) for name in _tensor_names()})

    def state_dict(self) -> dict[str, Any]:
        """Every field, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device | str) -> LossScale:
        """What :meth:`state_dict` gave, on a device of choice."""
        return cls(**state).to(device)


class CurrentScale:
    """The loss scale of one converted model: what its next forward pass uses.

    Several optimizers may step after one backward pass. What they find counts as one step: the
    first :meth:`update` moves the scale, and a later one, until the next forward pass, moves it
    anew from where it was, by what all of them have found.
    """

    def __init__(self, value: LossScale) -> None:
        self.value = value
        self.is_guarded = False
        self.was_read = False
        # A step's graph writes to the scale's own tensors; what a forward pass reads must stay.
        self.is_written = False
        self._before: LossScale | None = None
        self._found: torch.Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model starts with the same scale; no optimizer guards it yet."""
        return CurrentScale, (self.value,)

    def read(self) -> torch.Tensor:
        """The scale, for a forward pass whose gradients will be scaled by it."""
        self.was_read = True
        self._before = None
        return self.value.scale.clone() if self.is_written else self.value.scale

    def update(self, found_inf: torch.Tensor) -> None:
        """Move the scale, after a step whose gradients were finite (0) or not (1)."""
        if self._before is None or self._found is None:
            self._before, self._found = self.value, found_inf
        else:
            self._found = torch.maximum(self._found, found_inf.to(self._found.device))
        self.value = self._before.next(self._found)

    def replace(self, value: LossScale) -> None:
        """Use another scale, or another rule, from now on."""
        self.value, self._before = value.to(self.value.scale.device), None

    def move(self, device: torch.device) -> None:
        """Keep the scale on this device."""
        if self.value.scale.device != device:
            self.value, self._before = self.value.to(device), None


def _tensor_names() -> Iterator[str]:
    return (field.name for field in dataclasses.fields(LossScale) if field.metadata.get("tensor"))


def _rebuilt(value: LossScale, tensors: Mapping[str, Any]) -> LossScale:
    """A copy with other tensors, or whatever a tree map has made of them: nothing is checked."""
    new = object.__new__(LossScale)
    for field in dataclasses.fields(value):
        object.__setattr__(new, field.name, tensors.get(field.name, getattr(value, field.name)))
    return new


def _check(value: LossScale) -> None:
    for name in ("init_scale", "growth_factor", "backoff_factor", "min_scale", "max_scale"):
        number = getattr(value, name)
        if not (math.isfinite(number) and number > 0 and math.frexp(number)[0] == 0.5):
            raise PrecisionError(
                f"LossScale: {name} must be a power of two, found {number!r}. Multiplying by a "
                "power of two is exact; any other factor would round every gradient once more."
            )
    for name, low in (("growth_interval", 1), ("hysteresis", 1)):
        count = getattr(value, name)
        if not isinstance(count, int) or count < low:
            raise PrecisionError(f"LossScale: {name} must be an integer from {low}, found {count}")
    if not value.backoff_factor < 1 < value.growth_factor:
        raise PrecisionError(
            f"LossScale: growth_factor must be above 1 and backoff_factor below, found "
            f"{value.growth_factor} and {value.backoff_factor}. For a scale that stays as it is, "
            "pass dynamic=False."
        )
    if not value.min_scale <= value.init_scale <= value.max_scale:
        raise PrecisionError(
            f"LossScale: init_scale must lie between min_scale and max_scale, found "
            f"{value.min_scale} <= {value.init_scale} <= {value.max_scale}"
        )


def _flatten(value: LossScale) -> tuple[list[Any], tuple[tuple[str, Any], ...]]:
    rule = [field.name for field in dataclasses.fields(value) if not field.metadata.get("tensor")]
    tensors = [getattr(value, name) for name in _tensor_names()]
    return tensors, tuple((name, getattr(value, name)) for name in rule)


def _unflatten(tensors: Any, rule: tuple[tuple[str, Any], ...]) -> LossScale:
    new = object.__new__(LossScale)
    for name, part in (*rule, *zip(_tensor_names(), tensors, strict=True)):
        object.__setattr__(new, name, part)
    return new


pytree.register_pytree_node(
    LossScale, _flatten, _unflatten, serialized_type_name="mpgraph.LossScale"
)
