"""Where torch.amp is wrong or has no answer, fp16 gradients are held to float64's.

torch.amp.GradScaler scales the loss, so everything in the backward pass is scaled: gradients must
be unscaled by hand before they are clipped or looked at, two losses share one scale, the scale may
not move inside an accumulation window, and closures are refused. Here only the fp16 region is
scaled.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mpgraph
from mpgraph.module import state_of

SMALL = 2.0**-20  # gradients of this size vanish in fp16 without a scale


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 5))


def pair(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model in float64, and the same one converted."""
    exact = copy.deepcopy(model).double()
    return exact, mpgraph.convert(model, "fp16", **options)


def assert_true_gradients(exact: nn.Module, converted: nn.Module, tolerance: float = 1e-2) -> None:
    for (name, want), got in zip(exact.named_parameters(), converted.parameters(), strict=True):
        assert got.grad is not None, name
        assert got.grad.dtype is torch.float32
        error = (got.grad.double() - want.grad).abs().max()
        assert error <= tolerance * want.grad.abs().max(), name


def inputs(count: int = 1) -> list[Tensor]:
    return [torch.randn(4, 6) for _ in range(count)]


@pytest.mark.parametrize("policy", ["default", "lean", "autocast-cpu", "autocast-cuda"])
def test_small_gradients_arrive_whole(policy):
    exact, converted = pair(block(), policy=policy)
    (x,) = inputs()
    (exact(x.double()).square().mean() * SMALL).backward()
    (converted(x).square().mean() * SMALL).backward()
    assert_true_gradients(exact, converted)


def test_without_a_scale_they_would_not():
    exact, converted = pair(block())
    state_of(converted).scale.replace(mpgraph.LossScale(init_scale=1.0))
    (x,) = inputs()
    (exact(x.double()).square().mean() * SMALL).backward()
    (converted(x).square().mean() * SMALL).backward()
    with pytest.raises(AssertionError):
        assert_true_gradients(exact, converted)


def test_two_losses_of_different_sizes():
    exact, converted = pair(block())
    (x,) = inputs()
    y, z = exact(x.double()), converted(x)
    (y[:, 0].square().mean() * SMALL).backward(retain_graph=True)
    (z[:, 0].square().mean() * SMALL).backward(retain_graph=True)
    assert_true_gradients(exact, converted)
    y[:, 1].exp().mean().backward()
    z[:, 1].exp().mean().backward()
    assert_true_gradients(exact, converted)


def test_the_scale_moves_inside_an_accumulation_window():
    exact, converted = pair(block())
    for index, x in enumerate(inputs(4)):
        state_of(converted).scale.replace(mpgraph.LossScale(init_scale=2.0 ** (8 + 3 * index)))
        (exact(x.double()).square().mean() * SMALL).backward()
        (converted(x).square().mean() * SMALL).backward()
    assert_true_gradients(exact, converted)


def test_all_forward_passes_come_before_all_backward_passes():
    exact, converted = pair(block())
    losses = []
    for index, x in enumerate(inputs(3)):
        state_of(converted).scale.replace(mpgraph.LossScale(init_scale=2.0 ** (8 + 3 * index)))
        losses.append((exact(x.double()).square().mean(), converted(x).square().mean()))
    for want, got in reversed(losses):
        want.backward()
        got.backward()
    assert_true_gradients(exact, converted)


def test_hooks_on_parameters_and_results_see_true_gradients():
    exact, converted = pair(block())
    (x,) = inputs()
    seen: dict[str, list[Tensor]] = {"exact": [], "converted": []}
    for name, model in (("exact", exact), ("converted", converted)):
        model[0].weight.register_hook(lambda g, name=name: seen[name].append(g.double()))
        y = model(x.to(model[0].weight.dtype))
        y.register_hook(lambda g, name=name: seen[name].append(g.double()))
        (y.square().mean() * SMALL).backward()
    for got, want in zip(seen["converted"], seen["exact"], strict=True):
        assert (got - want).abs().max() < 1e-2 * want.abs().max()


class Outer(nn.Module):
    """An ordinary model around a part that is converted."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(6, 6), block(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.inner(self.before(x))))


def test_a_converted_part_of_an_ordinary_model():
    model = Outer()
    exact = copy.deepcopy(model).double()
    model.inner = mpgraph.convert(model.inner, "fp16")
    (x,) = inputs()
    (exact(x.double()).square().mean() * SMALL).backward()
    (model(x).square().mean() * SMALL).backward()
    assert_true_gradients(exact, model)


def test_two_converted_parts_with_scales_of_their_own():
    model = nn.Sequential(block(), nn.Linear(5, 6), block())
    exact = copy.deepcopy(model).double()
    for index, scale in ((0, 2.0**20), (2, 2.0**15)):
        model[index] = mpgraph.convert(model[index], "fp16")
        state_of(model[index]).scale.replace(mpgraph.LossScale(init_scale=scale))
    (x,) = inputs()
    (exact(x.double()).square().mean() * SMALL).backward()
    (model(x).square().mean() * SMALL).backward()
    assert_true_gradients(exact, model)


def penalised(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    y = model(x).sum(-1)
    (g,) = torch.autograd.grad(y.sum() * 2.0**-8, x, create_graph=True)
    return y.square().mean() + (g.norm(dim=-1) * 2.0**8 - 1).square().mean()


def test_a_gradient_penalty():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5))
    exact, converted = pair(model)
    state_of(converted).scale.replace(mpgraph.LossScale(init_scale=2.0**8))
    (x,) = inputs()
    penalised(exact, x.double()).backward()
    penalised(converted, x).backward()
    assert_true_gradients(exact, converted, tolerance=2e-2)


def test_a_tensor_in_fp16_from_outside_gets_a_true_gradient():
    exact, converted = pair(block())
    h = torch.randn(4, 6, dtype=torch.float16, requires_grad=True)
    x = h.detach().double().requires_grad_()
    exact(x).square().mean().backward()
    converted(h).square().mean().backward()
    assert h.grad.dtype is torch.float16
    assert (h.grad.double() - x.grad).abs().max() < 1e-2 * x.grad.abs().max()
    assert_true_gradients(exact, converted)


class Attribute(nn.Module):
    """Trains a tensor that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.extra = torch.randn(6, 6, requires_grad=True)

    def forward(self, x: Tensor) -> list[Tensor | int | None]:
        return [None, 3, self.layer(x @ self.extra.to(x.dtype))]


def test_a_tensor_that_is_no_parameter_gets_a_true_gradient():
    model = Attribute()
    converted = mpgraph.convert(model, "fp16")
    (x,) = inputs()
    (converted(x)[2].square().mean() * SMALL).backward()
    got, model.extra.grad = model.extra.grad, None
    (model(x)[2].square().mean() * SMALL).backward()
    assert (got - model.extra.grad).abs().max() < 1e-2 * model.extra.grad.abs().max()


def test_lbfgs_finds_the_same_minimum():
    torch.manual_seed(0)
    x, target = torch.randn(32, 6), torch.randn(32, 2)
    exact, converted = pair(nn.Sequential(nn.Linear(6, 2)))
    ends = []
    for model, optimizer in (
        (exact, torch.optim.LBFGS(exact.parameters(), max_iter=20)),
        (converted, torch.optim.LBFGS(converted.parameters(), max_iter=20)),
    ):
        dtype = model[0].weight.dtype
        if model is converted:
            mpgraph.guard(optimizer, model)

        def evaluate(model=model, optimizer=optimizer, dtype=dtype):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x.to(dtype)).to(dtype), target.to(dtype))
            loss.backward()
            return loss

        optimizer.step(evaluate)
        ends.append(evaluate().item())
    assert ends[1] == pytest.approx(ends[0], rel=1e-3)


# --- The Dynamo engine -----------------------------------------------------------------------


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 0.5

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 0.5


class Shift(torch.autograd.Function):
    """Adds something to the gradient, so that it matters how large that is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 0.5

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 0.5 + SMALL


class Seen(nn.Module):
    """What torch.export would not carry: a hook, a custom Function, a checkpoint, a branch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.seen = kind, []
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.kind == "hook":
            h.register_hook(lambda g: self.seen.append(g.clone()))
        elif self.kind == "traced hook":
            h.register_hook(lambda g: g + SMALL)
        elif self.kind == "function":
            h = Half.apply(h)
        elif self.kind == "function on fp32":
            h = Shift.apply(h if h.dtype is torch.float64 else h.float())
        elif self.kind == "checkpoint":
            h = checkpoint(lambda v: F.softmax(self.first(v), -1), h, use_reentrant=False)
        elif h.sum() > -1e9:
            h = h * 2
        return self.second(torch.tanh(h))


KINDS = ["hook", "traced hook", "function", "function on fp32", "checkpoint", "branch"]


@pytest.mark.parametrize("policy", ["default", "autocast-cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_dynamo_carries_has_true_gradients(kind, policy):
    model = Seen(kind)
    exact = Seen(kind).double()
    exact.load_state_dict(model.state_dict())
    converted = mpgraph.convert(model, "fp16", capture="dynamo", policy=policy)
    (x,) = inputs()
    (exact(x.double()).square().mean() * SMALL).backward()
    (converted(x).square().mean() * SMALL).backward()
    assert_true_gradients(exact, converted)
    if kind == "hook":
        (got,), (want,) = converted.seen, exact.seen
        assert (got.double() - want).abs().max() < 1e-2 * want.abs().max()


# --- fp16 throughout -------------------------------------------------------------------------


def test_pure_fp16_gets_the_gradients_that_fp16_can_hold():
    model = block()
    exact, pure = copy.deepcopy(model).double(), mpgraph.convert(model, "fp16-true")
    (x,) = inputs()
    exact(x.double()).square().mean().mul(2.0**-10).backward()
    pure(x.half()).square().mean().mul(2.0**-10).backward()
    for (name, want), got in zip(exact.named_parameters(), pure.parameters(), strict=True):
        assert got.dtype is got.grad.dtype is torch.float16
        error = (got.grad.double() - want.grad).abs().max()
        assert error <= 3e-2 * want.grad.abs().max() + 2.0**-24, name


def test_a_guarded_step_in_pure_fp16_is_skipped_or_taken():
    pure = mpgraph.convert(block(), "fp16-true")
    optimizer = mpgraph.guard(torch.optim.SGD(pure.parameters(), lr=0.1), pure)
    before = [p.detach().clone() for p in pure.parameters()]
    (x,) = inputs()
    (pure(x.half()).square().mean() * float("inf")).backward()
    optimizer.step()
    assert optimizer.last_step_skipped
    assert all(torch.equal(p, b) for p, b in zip(pure.parameters(), before, strict=True))
    optimizer.zero_grad()
    pure(x.half()).square().mean().backward()
    optimizer.step()
    assert not optimizer.last_step_skipped


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 6, sparse=True), nn.Linear(6, 5)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.table(index))


@pytest.mark.parametrize("capture", ["export", "dynamo"])
def test_pure_fp16_trains_an_embedding_with_sparse_gradients(capture):
    model, index = Lookup(), torch.tensor([1, 5, 1])
    exact = copy.deepcopy(model).double()
    pure = mpgraph.convert(model, "fp16-true", capture=capture)
    exact(index).square().mean().backward()
    pure(index).square().mean().backward()
    got, want = pure.table.weight.grad, exact.table.weight.grad.to_dense()
    assert got.is_sparse
    assert got.dtype is torch.float16
    assert (got.to_dense().double() - want).abs().max() < 1e-2 * want.abs().max()
    optimizer = mpgraph.guard(torch.optim.SparseAdam(pure.table.parameters()), pure)
    optimizer.step()
    assert not optimizer.last_step_skipped


class TwoMixedLosses(nn.Module):
    """The second loss takes an fp32 value that came out of the first one's broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h, k = self.a(x), self.b(x)
        return torch.nn.functional.mse_loss(h, x) + torch.nn.functional.mse_loss(k, x)


def test_operators_of_mixed_dtypes_in_a_row_let_no_scale_out():
    torch.manual_seed(0)
    model, x = TwoMixedLosses(), torch.randn(6, 8, requires_grad=True)
    (want,) = torch.autograd.grad(model(x), x)
    (got,) = torch.autograd.grad(mpgraph.convert(model, "fp16")(x), x)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=2e-4)
