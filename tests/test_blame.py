"""blame: what it reports, what it leaves alone, and what it says when fp16 is not to blame."""

from __future__ import annotations

import json
import math
import random
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mpgraph
from mpgraph.module import state_of
from mpgraph.ranges.records import Spread

inf, nan = float("inf"), float("nan")


class Net(nn.Module):
    """Two linear layers around a factor, which makes values large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.second(self.norm(self.first(x) * factor))


def net(precision: str = "fp16", **options: Any) -> nn.Module:
    return mpgraph.convert(Net(), precision, **options)


def square(outputs: Tensor) -> Tensor:
    return outputs.square().mean()


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


# --- a finite step ----------------------------------------------------------------------------


def test_finite_step_has_ranges_and_no_finding():
    report = mpgraph.blame(net(), X, loss_fn=square)
    assert report.is_finite
    assert report.finding is None
    assert report.loss == pytest.approx(square(net()(X)).item(), rel=1)
    names = [node.name for node in report.nodes if node.role == "operator"]
    assert names == ["linear", "mul", "layer_norm", "linear_1"]
    (last,) = [node for node in report.nodes if node.name == "linear_1"]
    assert (last.module, last.dtype) == ("second", "fp16")
    assert last.forward.count == 20
    assert "return self.second" in last.line


def test_true_gradient_is_the_one_in_fp32_and_the_other_is_scaled():
    torch.manual_seed(0)
    plain = Net()
    report = mpgraph.blame(mpgraph.convert(plain, "fp16"), X, loss_fn=square)
    square(plain(X)).backward()
    (weight,) = [n for n in report.nodes if n.name == "w_first_weight_fp16"]
    assert weight.role == "weight"
    assert weight.true_gradient.largest == plain.first.weight.grad.abs().max().item()
    assert weight.gradient.largest == pytest.approx(weight.true_gradient.largest * 2**16, rel=0.02)
    assert weight.true_forward.largest == plain.first.weight.abs().max().item()


def test_suggested_scale_leaves_a_factor_of_two():
    report = mpgraph.blame(net(), X, loss_fn=lambda y: square(y) * 1e5)
    largest = max(n.true_gradient.largest for n in report.nodes if n.dtype == "fp16" and n.gradient)
    assert report.finding.scale == report.suggested_scale
    assert report.suggested_scale * largest < 65504 / 2 <= report.suggested_scale * 2 * largest


def test_suggested_scale_stays_within_the_limits_of_the_loss_scale():
    report = mpgraph.blame(net(), X, loss_fn=lambda y: square(y) * 1e-9)
    assert report.suggested_scale == 2.0**24
    assert mpgraph.blame(net(), X, loss_fn=lambda y: square(y) * 1e20).suggested_scale is None


def test_shares_that_vanish_are_those_that_fp16_rounds_away():
    from mpgraph.ranges.measure import measure

    values = torch.logspace(-12, 6, 1000).double()
    values = torch.cat([values, torch.zeros(7, dtype=torch.float64)])
    spread = measure(values, exponents=True)
    assert (spread.count, spread.zeros, spread.bad) == (1007, 7, 0)
    for scale in (2.0**-4, 1.0, 2.0**10):
        half = (values * scale).half()
        gone = ((half == 0) & (values > 0)).sum().item() / 1000
        small = ((half > 0) & (half < 2.0**-14)).sum().item() / 1000
        assert spread.vanishing(scale) == pytest.approx(gone, abs=1e-9)
        assert spread.subnormal(scale) == pytest.approx(small, abs=1e-3)
        lost = values[half == 0].sum() / values.sum()
        assert spread.lost(scale) == pytest.approx(lost.item(), rel=0.5, abs=1e-15)
    assert spread.overflows(1.0)
    assert not spread.overflows(2.0**-4)


def test_spread_tells_infinite_from_nan_and_from_the_largest_finite():
    from mpgraph.ranges.measure import measure

    spread = measure(torch.tensor([1.0, -3.0, inf, -inf, nan, 0.0]).half(), exponents=True)
    assert spread == Spread(6, 1, 2, 1, 3.0, ((0, 1), (1, 1)))


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp16-true"])
def test_other_precisions_are_reported_on(precision):
    report = mpgraph.blame(net(precision), X, loss_fn=square)
    assert report.is_finite
    assert report.would_fit_fp16
    if precision != "fp16-true":
        assert "would fit fp16" in str(report)
        report = mpgraph.blame(net(precision), X, 1e7, loss_fn=square)
        assert report.is_finite
        assert not report.would_fit_fp16
        assert "Not every value" in str(report)


def test_without_a_loss_the_forward_pass_alone_is_replayed():
    report = mpgraph.blame(net(), X, factor=1e7)
    assert report.finding.kind == "forward"
    assert report.finding.tried
    assert all(node.gradient is None for node in report.nodes)
    assert "pass loss_fn" in report.notes[0]


def test_loss_of_the_model_itself_is_taken():
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.net(x)
            return {"y": y, "loss": y.square().mean()}

    report = mpgraph.blame(mpgraph.convert(WithLoss(), "fp16"), X)
    assert report.loss > 0
    assert any(node.gradient for node in report.nodes)


# --- nothing is left behind ---------------------------------------------------------------------


class Stateful(nn.Module):
    """Everything that a forward pass may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(8))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + x.sum(0)
        return self.drop(self.linear(self.norm(x)))


def everything(model: nn.Module) -> list[Any]:
    state = state_of(model)
    values = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    copies = [None if v is None else v.clone() for v in values]
    numbers = [state.scale.value.scale.clone(), torch.get_rng_state()]
    plain = [random.getstate(), model.calls, state.scale.was_read, state.scale.value.growth_tracker]
    return [*copies, *numbers, *plain]


@pytest.mark.parametrize("capture", ["auto", "dynamo"])
@pytest.mark.parametrize("fill", [1.0, 1e6])
def test_blame_leaves_no_trace(capture, fill):
    model = mpgraph.convert(Stateful(), "fp16", capture=capture)
    optimizer = mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.1), model, blame=True)
    model(X).square().mean().backward()
    identities = [id(v) for v in (*model.buffers(), *(p.grad for p in model.parameters()))]
    before = everything(model)

    mpgraph.blame(model, X * fill, loss_fn=square)

    for was, now in zip(before, everything(model), strict=True):
        assert torch.equal(was, now) if isinstance(was, Tensor) else was == now
    kept = (*model.buffers(), *(p.grad for p in model.parameters()))
    assert identities == [id(v) for v in kept]
    assert not any(p._backward_hooks for p in model.parameters())
    assert state_of(model).observer is optimizer.mpgraph.skips.calls[0]
    assert not state_of(model).weights.masters


def test_a_backward_pass_under_way_is_not_disturbed():
    model = mpgraph.convert(Stateful(), "fp16")
    torch.manual_seed(1)
    model(X).square().mean().backward()
    want = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    torch.manual_seed(1)
    loss = model(X).square().mean()
    mpgraph.blame(model, X * 100, loss_fn=square)
    loss.backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), want, strict=True))


def test_blame_trains_no_parameter_whose_hook_would_step():
    model = net()
    before = model.first.weight.detach().clone()
    model.first.weight.register_post_accumulate_grad_hook(lambda p: p.data.add_(1))
    mpgraph.blame(model, X, loss_fn=square)
    assert torch.equal(model.first.weight, before)


# --- what is not fp16's doing -------------------------------------------------------------------


def test_infinite_input_is_named():
    x = X.clone()
    x[0, 0] = inf
    report = mpgraph.blame(net(), x, loss_fn=square)
    assert (report.finding.kind, report.finding.name) == ("input", "x")
    assert "The input 'x' is not finite: it was given so." in str(report)


def test_nan_parameter_is_named():
    model = net()
    with torch.no_grad():
        model.second.bias[1] = nan
    finding = mpgraph.blame(model, X, loss_fn=square).finding
    assert (finding.kind, finding.name) == ("parameter", "second.bias")


def test_input_too_large_for_fp16_is_its_cast():
    finding = mpgraph.blame(net(), X * 1e6, loss_fn=square).finding
    assert (finding.kind, finding.source, finding.module) == ("forward", "x", "first")
    assert finding.overrides[0] == "module=first run=fp32"
    assert finding.tried


def test_what_fp32_cannot_hold_either_is_said():
    finding = mpgraph.blame(net(), X, 1e39, loss_fn=square).finding
    assert (finding.kind, finding.name) == ("fp32", "mul")
    assert not finding.overrides


def test_loss_outside_of_the_model_is_said():
    report = mpgraph.blame(net(), X, loss_fn=lambda y: (y * 1e5).half().square().mean())
    assert report.finding.kind == "loss"
    assert "outside of the model" in report.text(width=200)


class Masked(nn.Module):
    """A mask that fp16 makes infinite, which does no harm; and a factor that does some."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        q = self.q(x)
        scores = q @ q.mT + torch.ones(5, 5, dtype=q.dtype).triu(1) * -1e9
        return self.out(scores.softmax(-1) @ q) * factor


def test_a_harmless_infinity_is_not_blamed():
    model = mpgraph.convert(Masked(), "fp16")
    report = mpgraph.blame(model, X, loss_fn=square)
    assert report.is_finite
    assert any(node.forward.infinite for node in report.nodes)
    finding = mpgraph.blame(model, X, 1e8, loss_fn=square).finding
    assert finding.name.startswith("mul")


def test_a_scale_is_not_lowered_where_the_rest_would_vanish():
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
            self.high = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            low = sum(layer(x).float().mean() * 1e-10 for layer in self.layers)
            return low + self.high(x).float().mean() * 1e3

    model = mpgraph.convert(Apart(), "fp16")
    report = mpgraph.blame(model, X)
    assert report.finding.kind == "backward"
    assert report.finding.scale is None
    assert report.finding.overrides == ("module=high run=fp32",)
    assert report.finding.tried


# --- engines, containers ------------------------------------------------------------------------


class Broken(nn.Module):
    """Two graphs with Python between them."""

    def __init__(self, factor: float, after: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.factor, self.after = factor, after

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) * self.factor
        torch._dynamo.graph_break()
        return self.second(h) * self.after


@pytest.mark.parametrize(("factor", "after"), [(1e7, 1.0), (1.0, 1e7)])
def test_both_graphs_of_a_broken_model_are_seen(factor, after):
    model = mpgraph.convert(Broken(factor, after), "fp16", capture="dynamo")
    report = mpgraph.blame(model, X, loss_fn=lambda y: y.float().sin().mean() * 1e-8)
    assert {node.graph for node in report.nodes} == {1, 2}
    assert report.finding.kind == "forward"
    assert ("self.after" in report.finding.line) == (after > 1)
    assert report.finding.tried
    assert "not seen here" in report.notes[0]


@pytest.mark.parametrize(("precision", "error"), [("fp16", 1e-6), ("bf16", 1e-2)])
def test_true_ranges_go_on_in_fp32_behind_a_graph_break(precision, error):
    torch.manual_seed(0)
    plain = Broken(1e7, 1e-6)
    model = mpgraph.convert(plain, precision, capture="dynamo")
    report = mpgraph.blame(model, X, loss_fn=lambda y: y.float().square().mean() * 1e-8)
    y = plain.second(plain.first(X) * plain.factor)
    (y * plain.after).square().mean().mul(1e-8).backward()
    gradients = [n.true_gradient.largest for n in report.nodes if n.true_gradient]
    for linear in (plain.first, plain.second):
        want = pytest.approx(linear.weight.grad.abs().max().item(), rel=error)
        assert any(found == want for found in gradients)
    want = pytest.approx(y.abs().max().item(), rel=1e-6)
    assert any(n.true_forward.largest == want for n in report.nodes)


def test_a_hook_that_python_sets_between_two_graphs_runs_in_both_replays():
    class Hooked(Broken):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            torch._dynamo.graph_break()
            h.register_hook(lambda g: g * 1e20)
            torch._dynamo.graph_break()
            return self.second(h)

    report = mpgraph.blame(
        mpgraph.convert(Hooked(1, 1), "fp16", capture="dynamo"), X, loss_fn=square
    )
    (spread,) = [n.true_gradient for n in report.nodes if n.name == "w_first_weight_fp16"]
    assert spread.largest > 1e15


def test_what_overflows_in_python_is_said_to_be_between_graphs():
    class Between(Broken):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            torch._dynamo.graph_break()
            h = torch._dynamo.disable(torch.mul)(h, 1e7)
            return self.second(h)

    report = mpgraph.blame(
        mpgraph.convert(Between(1, 1), "fp16", capture="dynamo"), X, loss_fn=square
    )
    assert report.finding.kind == "between"
    assert not report.finding.overrides


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.reentrant = reentrant

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        def body(h: Tensor) -> Tensor:
            return self.inner(h.relu()) * factor

        h = checkpoint(body, self.first(x), use_reentrant=self.reentrant)
        return self.last(F.layer_norm(h, (8,)))


@pytest.mark.parametrize("capture", ["auto", "dynamo"])
def test_a_checkpoint_is_looked_into(capture):
    model = mpgraph.convert(Checkpointed(False), "fp16", capture=capture)
    report = mpgraph.blame(model, X, 1e7, loss_fn=square)
    finding = report.finding
    assert (finding.kind, finding.operator) == ("forward", "aten.mul.Tensor")
    # Where Dynamo keeps the checkpoint, what leaves it is fp16, whatever is pinned inside.
    assert finding.tried == (mpgraph.explain(model).graphs[0].engine == "export")


def test_gradients_inside_a_checkpoint_equal_those_without_one():
    torch.manual_seed(0)
    plain = Checkpointed(False)
    report = mpgraph.blame(mpgraph.convert(plain, "fp16"), X, loss_fn=square)
    square(plain(X)).backward()
    found = [n.true_gradient.largest for n in report.nodes if n.module == "inner" and n.gradient]
    assert plain.inner.weight.grad.abs().max().item() in [pytest.approx(v) for v in found]


def test_a_reentrant_checkpoint_is_looked_into():
    model = mpgraph.convert(Checkpointed(True), "fp16")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    finding = mpgraph.blame(model, X, 1e7, loss_fn=square).finding
    assert finding.kind == "forward"
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    report = mpgraph.blame(model, X, loss_fn=square)
    assert report.is_finite
    assert any(node.gradient for node in report.nodes)


class Times(torch.autograd.Function):
    """Its body has the dtypes that it was traced with, in fp32 replays too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1e4

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 1e9


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Times.apply(self.first(x)))


@pytest.mark.parametrize(("fill", "kind"), [(1.0, "backward"), (100.0, "forward")])
def test_a_custom_function_is_blamed_as_a_whole(fill, kind):
    report = mpgraph.blame(mpgraph.convert(WithFunction(), "fp16"), X * fill, loss_fn=square)
    assert report.finding.kind == kind
    assert not report.finding.tried


def test_no_cure_is_claimed_for_the_models_own_cast():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear((x * 1e6).half())

    report = mpgraph.blame(mpgraph.convert(Own(), "fp16"), X, loss_fn=square)
    assert report.finding.operator == "aten.to.dtype"
    assert report.finding.tried is False
    assert "none found" in str(report)


def test_a_converted_part_of_an_ordinary_model_is_blamed():
    model = nn.Sequential(nn.Linear(8, 8), net(), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].first.weight.mul_(1e8)
    finding = mpgraph.blame(model, X, loss_fn=square).finding
    assert finding.module == "first"
    assert finding.overrides[0] == "module=first run=fp32"
    assert finding.tried


# --- errors ---------------------------------------------------------------------------------------


def test_an_ordinary_model_is_refused():
    with pytest.raises(mpgraph.MPGraphError, match=r"mpgraph\.convert\(model"):
        mpgraph.blame(nn.Linear(8, 8), X)


def test_a_loss_of_several_numbers_is_refused():
    with pytest.raises(mpgraph.MPGraphError, match=r"must be one number.*shape \(5, 4\)"):
        mpgraph.blame(net(), X, loss_fn=lambda y: y)


def test_wrong_arguments_are_the_models_own_error():
    with pytest.raises(TypeError, match=r"Net\.forward"):
        mpgraph.blame(net(), X, 1.0, 2.0)


# --- text, data, picture ------------------------------------------------------------------------


def test_report_says_what_where_and_what_to_do():
    report = mpgraph.blame(net(), X, 1e7, loss_fn=square)
    text = str(report)
    assert "Forward: %mul (mul.Tensor, fp16) left the range of fp16." in text
    assert "test_blame.py" in text
    assert "of 80 values infinite or NaN" in text
    assert 'policy="default; node=mul run=fp32' in text
    assert "with it the step is finite" in text
    assert all(node.name in report.text(verbose=True, width=200) for node in report.nodes)
    assert max(map(len, report.text(verbose=True, width=100).splitlines())) <= 100


def test_report_goes_through_json(tmp_path):
    report = mpgraph.blame(net(), X, 1e7, loss_fn=square)
    path = tmp_path / "ranges.json"
    report.to_json(path)
    loaded = mpgraph.RangeReport.load(path)
    assert math.isnan(loaded.loss)
    assert (loaded.nodes, loaded.finding) == (report.nodes, report.finding)
    assert str(loaded) == str(report)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    with pytest.raises(mpgraph.MPGraphError, match="schema"):
        mpgraph.RangeReport.from_dict({"schema": 0})


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_picture_is_written_whole(tmp_path, ending, start):
    pytest.importorskip("matplotlib")
    mpgraph.blame(net(), X, 1e7, loss_fn=square).plot(tmp_path / f"ranges.{ending}")
    (path,) = tmp_path.iterdir()
    assert path.read_bytes().startswith(start)


def test_picture_without_matplotlib_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = mpgraph.blame(net(), X, loss_fn=square)
    with pytest.raises(mpgraph.MPGraphError, match="with its extra 'demo'"):
        report.plot(tmp_path / "ranges.png")
    assert not list(tmp_path.iterdir())


# --- guard ----------------------------------------------------------------------------------------


def train(model: nn.Module, steps: int, factor: float = 1e7, **options: Any) -> Any:
    make = options.pop("make", torch.optim.SGD)
    optimizer = mpgraph.guard(make(model.parameters()), model, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        square(model(X, factor)).backward()
        optimizer.step()
    return optimizer


def test_guard_says_once_how_to_find_what_overflows():
    with pytest.warns(UserWarning, match=r"3 steps in a row.*mpgraph\.blame\(model") as caught:
        train(net(), 6, blame_after=3)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_guard_names_the_value_if_asked_to():
    model = net()
    with pytest.warns(UserWarning, match=r"Forward: %mul .*policy=.*node=mul") as caught:
        train(model, 6, blame=True)
    assert len(caught) == 1


def test_guard_names_a_gradient_from_the_gradients_of_the_step():
    model = net()
    optimizer = mpgraph.guard(torch.optim.SGD(model.parameters()), model, blame=True, blame_after=1)
    (square(model(X)) * 1e5).backward()
    with pytest.warns(UserWarning, match=r"Backward: the gradient of %.*scale=") as caught:
        optimizer.step()
    assert len(caught) == 1


def test_guard_tells_a_loss_from_a_model():
    model = net()
    optimizer = mpgraph.guard(torch.optim.SGD(model.parameters()), model, blame=True, blame_after=1)
    (square(model(X)) * inf).backward()
    with pytest.warns(UserWarning, match="the loss, outside of the model"):
        optimizer.step()


def test_nobody_waits_for_a_fused_optimizer_unless_asked_to(recwarn):
    def fused(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, fused=True)

    train(net(), 6, make=fused)
    assert not [w for w in recwarn if "in a row" in str(w.message)]
    with pytest.warns(UserWarning, match="5 steps in a row"):
        train(net(), 6, make=fused, blame=True)


def test_floor_warns_once_or_raises():
    low = mpgraph.LossScale(init_scale=2.0**-13)
    with pytest.warns(UserWarning, match="goes no lower") as caught:
        train(net(), 6, blame_after=2, scale=low)
    assert len(caught) == 1
    with pytest.raises(mpgraph.PrecisionError, match="goes no lower"):
        train(net(), 6, scale=low, on_floor="raise")
    with pytest.raises(mpgraph.PrecisionError, match="on_floor"):
        train(net(), 0, on_floor="stop")
    with pytest.raises(mpgraph.PrecisionError, match="blame_after"):
        train(net(), 0, blame_after=0)
