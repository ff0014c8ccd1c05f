"""Bitwise comparison of two training steps, and the verdict on the second.

A step is read into a flat table (`Reading`): every output, the loss, the inputs and buffers as
the step left them, every gradient, and the state of the random number generators. Two tables are
then compared row by row.
"""

from __future__ import annotations

import dataclasses
import enum
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .registry import Call
from .values import leaves

# A difference counts as rounding while its norm is within this factor of the difference that
# 16-bit rounding itself makes to the same tensor (autocast against float32) ...
ROUNDING_FACTOR = 8.0
# ... or while it is this small relative to the tensor, whatever rounding made of it.
ROUNDING_FLOOR = 0.05

Reading = dict[str, Any]


class Verdict(str, enum.Enum):
    """What came of one model, from best to worst; the last is about eager torch alone."""

    BITWISE = "bitwise"
    CLOSE = "close"
    WRONG = "wrong"
    REFUSED = "refused"
    ERROR = "error"
    EAGER_FAILS = "eager-fails"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class Difference:
    """One row in which the two readings differ."""

    name: str
    what: str
    max_abs: float = 0.0
    relative: float = 0.0
    is_rounding: bool = True

    def __str__(self) -> str:
        if self.what != "values":
            return f"{self.name}: {self.what}"
        return f"{self.name}: max abs {self.max_abs:.3g}, relative {self.relative:.3g}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All rows in which the two readings differ, in the order of computation."""

    differences: tuple[Difference, ...]
    rows: int

    @property
    def verdict(self) -> Verdict:
        """``bitwise``, ``close`` if rounding explains every difference, else ``wrong``."""
        if not self.differences:
            return Verdict.BITWISE
        return Verdict.CLOSE if all(d.is_rounding for d in self.differences) else Verdict.WRONG

    @property
    def first(self) -> Difference | None:
        """The first difference that settled the verdict."""
        decisive = [d for d in self.differences if not d.is_rounding]
        return next(iter(decisive or self.differences), None)

    @property
    def worst(self) -> float:
        """The largest relative difference among rows of equal dtype and shape."""
        return max((d.relative for d in self.differences), default=0.0)

    def __str__(self) -> str:
        if not self.differences:
            return f"bitwise equal in {self.rows} rows"
        return (
            f"{self.first}; {len(self.differences)} of {self.rows} rows differ, "
            f"worst relative {self.worst:.3g}"
        )


def seed_everything(seed: int) -> None:
    """Seed torch's, Python's and numpy's generators."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def take_step(module: nn.Module, call: Call, loss: Callable[[Any], Tensor], seed: int) -> Reading:
    """Run forward and backward of one training step and read what it leaves behind.

    Gradients are cleared first. Any autocast region must be inside ``module``: the loss and the
    backward run outside it.
    """
    for parameter in module.parameters():
        parameter.grad = None
    seed_everything(seed)
    outputs = module(*call.args, **call.kwargs)
    value = loss(outputs)
    value.backward()
    return _read(module, call, outputs, value)


def _read(module: nn.Module, call: Call, outputs: Any, loss: Tensor) -> Reading:
    reading: Reading = {f"output{path}": leaf for path, leaf in leaves(outputs)}
    reading["loss"] = loss
    for path, leaf in leaves((call.args, dict(call.kwargs))):
        reading[f"input{path}"] = leaf
        if isinstance(leaf, Tensor) and leaf.is_leaf and leaf.requires_grad:
            reading[f"input gradient{path}"] = leaf.grad
    reading |= {f"buffer {name}": buffer for name, buffer in module.named_buffers()}
    reading |= dict(_attributes(module))
    # The backward reaches the last parameters first: there a difference begins.
    for name, parameter in reversed(list(module.named_parameters())):
        reading[f"gradient {name}"] = parameter.grad
    reading["generator torch"] = torch.get_rng_state()
    if any(parameter.is_cuda for parameter in module.parameters()):
        reading["generator cuda"] = torch.cuda.get_rng_state()
    reading["generator python"] = hash(random.getstate())
    reading["generator numpy"] = hash(np.random.get_state()[1].tobytes())  # type: ignore[index]
    return {name: _kept(value) for name, value in reading.items()}


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what a forward may have left in ordinary attributes of any submodule."""
    for path, submodule in module.named_modules():
        for key, value in vars(submodule).items():
            if key not in _MODULE_ATTRIBUTES and isinstance(value, Tensor | int | float | str):
                yield f"attribute {path}.{key}".replace(" .", " "), value


def _kept(value: Any) -> Any:
    """Copy a tensor, so that the next step does not change it under us."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def is_finite(reading: Reading) -> bool:
    """Whether the loss and every gradient are finite."""
    return all(
        bool(_dense(value).isfinite().all())
        for name, value in reading.items()
        if isinstance(value, Tensor) and ("gradient" in name or name == "loss")
    )


def gradient_count(reading: Reading) -> int:
    """Count parameters that received a gradient other than zero."""
    gradients = [v for k, v in reading.items() if k.startswith("gradient ") and v is not None]
    return sum(bool((_dense(g) != 0).any()) for g in gradients)


def compare(
    reference: Reading, got: Reading, in_float32: Callable[[], Reading | None] = lambda: None
) -> Comparison:
    """Compare two readings row by row.

    Args:
        reference: The step that is right by definition.
        got: The step under test.
        in_float32: The same step without autocast, asked for only where values differ: how far
            16-bit rounding moved the reference away from it is how far rounding may move ``got``.
    """
    found = list(_differences(reference, got))
    if any(d.what == "values" for d in found):
        exact = in_float32() or {}
        found = [_judge(d, reference, got, exact) for d in found]
        found = [_judge_integers(d, reference, found) for d in found]
    return Comparison(tuple(found), len(reference.keys() | got.keys()))


def _differences(reference: Reading, got: Reading) -> Iterator[Difference]:
    for name in [*reference, *(n for n in got if n not in reference)]:
        if name not in got:
            yield Difference(name, "missing", is_rounding=False)
        elif name not in reference:
            if name.startswith("attribute "):  # a converted model may keep notes of its own
                continue
            yield Difference(name, "not in the reference", is_rounding=False)
        else:
            difference = compare_row(name, reference[name], got[name])
            if difference is not None:
                yield difference


def compare_row(name: str, want: Any, got: Any) -> Difference | None:
    """Compare one row; None if both are the same to the bit (any NaN equals any NaN)."""
    if not (isinstance(want, Tensor) and isinstance(got, Tensor)):
        return _compare_plain(name, want, got)
    for what in ("dtype", "shape", "layout", "device", "requires_grad"):
        a, b = getattr(want, what), getattr(got, what)
        if a != b:
            short = [str(v).removeprefix("torch.") for v in (a, b)]
            return Difference(name, f"{what} {short[1]} instead of {short[0]}", is_rounding=False)
    want, got = _dense(want), _dense(got)
    if _same_bits(want, got):
        return None
    if name.startswith("generator"):
        return Difference(name, "left in another state")
    return Difference(name, "values", *_distance(want, got))


def _compare_plain(name: str, want: Any, got: Any) -> Difference | None:
    if isinstance(want, Tensor) or isinstance(got, Tensor) or type(want) is not type(got):
        if want is None and isinstance(got, Tensor) and not _dense(got).any():
            return Difference(name, "zeros instead of None")
        described = [_describe(v) for v in (got, want)]
        return Difference(name, f"{described[0]} instead of {described[1]}", is_rounding=False)
    if want == got or want != want:
        return None
    if name.startswith("generator"):
        return Difference(name, "left in another state")
    return Difference(name, f"{got!r} instead of {want!r}", is_rounding=False)


def _describe(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


def _dense(tensor: Tensor) -> Tensor:
    dense = tensor.detach()
    dense = dense.to_dense() if dense.layout is not torch.strided else dense
    return torch.view_as_real(dense) if dense.is_complex() else dense


_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same_bits(want: Tensor, got: Tensor) -> bool:
    if not want.is_floating_point():
        return torch.equal(want, got)
    bits = _INTEGER_OF_SIZE[want.element_size()]
    same = want.contiguous().view(bits) == got.contiguous().view(bits)
    return bool((same | (want.isnan() & got.isnan())).all())


def _distance(want: Tensor, got: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the same relative to the largest element."""
    if want.numel() == 0:
        return 0.0, 0.0
    difference = (want.double() - got.double()).abs().max().item()
    scale = want.double().abs().max().item()
    return difference, difference / scale if scale else float("inf")


def _judge(found: Difference, reference: Reading, got: Reading, exact: Reading) -> Difference:
    """Settle whether 16-bit rounding explains a difference in floating-point values."""
    if found.what != "values":
        return found
    want, given = _dense(reference[found.name]).double(), _dense(got[found.name]).double()
    apart, size = (want - given).norm().item(), want.norm().item()
    limit = ROUNDING_FLOOR * size
    base = exact.get(found.name)
    if isinstance(base, Tensor) and base.shape == reference[found.name].shape:
        rounding = (_dense(base).double() - want).norm().item()
        limit = max(limit, ROUNDING_FACTOR * min(rounding, size))
    is_lost = size > 0 and given.norm().item() == 0
    return dataclasses.replace(found, is_rounding=apart <= limit and not is_lost)


def _judge_integers(found: Difference, reference: Reading, all_: list[Difference]) -> Difference:
    """Let rounding explain other integers (an argmax, say) only where a float row differs too."""
    if found.what != "values" or reference[found.name].is_floating_point():
        return found
    moved = (d for d in all_ if d.what == "values" and reference[d.name].is_floating_point())
    return dataclasses.replace(found, is_rounding=any(True for _ in moved))


def unshared(source: nn.Module, converted: nn.Module) -> str:
    """Return why a converted model is no stand-in for its source, or an empty string.

    It must be an instance of the source's class, with the source's own parameters under the same
    names.
    """
    if not isinstance(converted, type(source)):
        return f"the converted model is no {type(source).__name__}"
    own: Mapping[str, Tensor] = dict(source.named_parameters())
    theirs: Mapping[str, Tensor] = dict(converted.named_parameters())
    if own.keys() != theirs.keys():
        return f"parameter names differ: {sorted(own.keys() ^ theirs.keys())[:3]}"
    apart = [name for name in own if own[name] is not theirs[name]]
    return f"parameters are not shared: {apart[:3]}" if apart else ""
