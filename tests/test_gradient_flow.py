"""Which operators of mixed dtypes may be given widened inputs: those where no bit changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpgraph
from mpgraph.gradient_flow import _PROMOTING
from mpgraph.module import state_of

Binary = Callable[[Tensor, Tensor], Tensor]
SHAPE = (16, 64)

# By name: a function of two tensors, one of which may be in 16 bit. "name 2" is another form.
EXACT: dict[str, Binary] = {
    "add": lambda a, b: torch.add(a, b, alpha=0.3),
    "sub": lambda a, b: torch.sub(a, b, alpha=0.3),
    "rsub": lambda a, b: torch.rsub(a, b, alpha=0.3),
    "mul": torch.mul,
    "div": torch.div,
    "div 2": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "true_divide": torch.true_divide,
    "where": lambda a, b: torch.where((a > 0).logical_xor(b > 0), a, b),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "hypot": torch.hypot,
    "remainder": torch.remainder,
    "fmod": torch.fmod,
    "copysign": torch.copysign,
    "xlogy": torch.xlogy,
    "logaddexp": torch.logaddexp,
}
EXACT_IN_PLACE: dict[str, Binary] = {
    "copy": lambda a, b: a.clone().copy_(b),
    "add": lambda a, b: a.clone().add_(b, alpha=0.3),
    "sub": lambda a, b: a.clone().sub_(b, alpha=0.3),
    "mul": lambda a, b: a.clone().mul_(b),
    "div": lambda a, b: a.clone().div_(b),
    "hypot": lambda a, b: a.clone().hypot_(b),
    "remainder": lambda a, b: a.clone().remainder_(b),
    "fmod": lambda a, b: a.clone().fmod_(b),
    "copysign": lambda a, b: a.clone().copysign_(b),
    "xlogy": lambda a, b: a.clone().xlogy_(b),
}
ROUNDING: dict[str, Binary] = {
    "pow": torch.pow,
    "atan2": torch.atan2,
    "addcmul": lambda a, b: torch.addcmul(a, b, b, value=0.3),
    "addcmul 2": lambda a, b: torch.addcmul(b, a, b, value=0.3),
    "addcmul 3": lambda a, b: torch.addcmul(b, a, a),
    "addcdiv": lambda a, b: torch.addcdiv(a, b, b, value=0.3),
    "addcdiv 2": lambda a, b: torch.addcdiv(b, b, a),
}
ROUNDING_IN_PLACE: dict[str, Binary] = {
    "pow": lambda a, b: a.clone().pow_(b),
    "atan2": lambda a, b: a.clone().atan2_(b),
    "addcmul": lambda a, b: a.clone().addcmul_(b, b, value=0.3),
    "addcdiv": lambda a, b: a.clone().addcdiv_(b, b, value=0.3),
    "addcmul of a part": lambda a, b: _written(a.clone(), b),
}


def _written(a: Tensor, b: Tensor) -> Tensor:
    a[:, :8].addcmul_(b[:, :8], b[:, 8:16])
    return a * 2


def values(name: str, seed: int) -> Tensor:
    torch.manual_seed(seed)
    x = torch.randn(SHAPE) * torch.logspace(-3, 1, SHAPE[1])
    return x.abs().clamp(0.25, 3) if name.split()[0] in ("pow", "xlogy", "addcdiv") else x


def gradients(function: Binary, inputs: list[Tensor], widen: bool) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = function(*[x.float() if widen else x for x in leaves])
    assert result.dtype is torch.float32
    torch.manual_seed(9)
    found = torch.autograd.grad(result, leaves, torch.randn(result.shape), allow_unused=True)
    return (result.detach(), *(g for g in found if g is not None))


def in_half(name: str, half: torch.dtype, which: str) -> list[Tensor]:
    a, b = values(name, 0), values(name, 1)
    if which == "first":
        return [a.to(half), b]
    return [a, b[0].to(half) if which == "broadcast second" else b.to(half)]


def test_every_operator_that_is_said_to_promote_is_tested():
    assert {name.split()[0] for name in EXACT} == _PROMOTING


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", ["first", "second", "broadcast second"])
@pytest.mark.parametrize("name", EXACT)
def test_widening_an_input_of_what_promotes_changes_no_bit(name, which, half):
    inputs = in_half(name, half, which)
    got, want = (gradients(EXACT[name], inputs, widen) for widen in (True, False))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", ["second", "broadcast second"])
@pytest.mark.parametrize("name", EXACT_IN_PLACE)
def test_widening_what_an_operator_in_place_takes_changes_no_bit(name, which, half):
    if name == "copy" and which != "second":
        pytest.skip("torch adds up a broadcast copy's gradients in 16 bit; widened, in float32")
    inputs = in_half(name, half, which)
    got, want = (gradients(EXACT_IN_PLACE[name], inputs, widen) for widen in (True, False))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ROUNDING)
def test_widening_an_input_of_the_others_would(name):
    pairs = []
    for which in ("first", "second"):
        inputs = in_half(name, torch.float16, which)
        pairs += [[gradients(ROUNDING[name], inputs, widen) for widen in (True, False)]]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*map(list, zip(*pairs, strict=True)), rtol=0, atol=0)


class Mixed(nn.Module):
    """An operator between an fp32 value and an fp16 one."""

    def __init__(self, function: Binary, swapped: bool) -> None:
        super().__init__()
        self.layer, self.functions, self.swapped = nn.Linear(64, 64), [function], swapped

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        h = self.layer(x)
        if positive:
            h = h.abs() + 0.25
        return self.functions[0](*((h, x) if self.swapped else (x, h)))


ALL = [(EXACT, False), (EXACT, True), (ROUNDING, False), (ROUNDING, True)]
ALL += [(EXACT_IN_PLACE, False), (ROUNDING_IN_PLACE, False)]
CASES: list[Any] = [
    pytest.param(table[name], name, swapped, id=f"{name} {index}")
    for index, (table, swapped) in enumerate(ALL)
    for name in table
]


@pytest.mark.parametrize(("function", "name", "swapped"), CASES)
def test_gradients_of_mixed_operators_are_those_of_autocast(function, name, swapped):
    scale = 2.0**6
    model = Mixed(function, swapped)
    converted = mpgraph.convert(copy.deepcopy(model), "fp16", policy="autocast-cpu")
    state_of(converted).scale.replace(mpgraph.LossScale(init_scale=scale))
    positive = name.split()[0] in ("pow", "xlogy", "addcdiv")
    x, y = (values(name, 0).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.float16):
        want = model(x, positive)
    torch.manual_seed(9)
    cotangent = torch.randn(want.shape) / 64
    (want.float() * scale * cotangent).sum().backward()
    (converted(y, positive) * cotangent).sum().backward()
    assert_bits(y.grad, x.grad / scale)
    for one, other in zip(converted.parameters(), model.parameters(), strict=True):
        assert_bits(one.grad, other.grad / scale)


def assert_bits(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
