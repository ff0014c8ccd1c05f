"""The Dynamo engine against eager ``torch.autocast``, bit for bit, where export cannot go."""

from __future__ import annotations

import copy
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mpgraph
from mpgraph import CaptureError
from mpgraph.capture import compiled, dynamo_settings, engines, lower
from mpgraph.capture.keep import CannotLower
from mpgraph.capture.kept import HOOK
from mpgraph.module import state_of
from mpgraph.pipeline import NeedsStaticShapes
from mpgraph.weights import WeightCopies

np = pytest.importorskip("numpy")
BATCHES = (4, 4, 6, 3)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def seed(number: int = 0) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


class Run:
    """What a few training steps gave: everything that autocast could have made otherwise."""

    def __init__(self, model: nn.Module, call: Callable[[Any], Any], batches: Any) -> None:
        self.steps: list[dict[str, Any]] = []
        seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        for x in batches:
            x = x.clone().requires_grad_()
            optimizer.zero_grad()
            loss = call(x)
            loss.backward()
            found: dict[str, Any] = {"loss": loss.detach(), "input": x.grad}
            found |= {f"grad {n}": _copied(p.grad) for n, p in model.named_parameters()}
            found |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
            found["random"] = (torch.rand(()), random.random(), np.random.rand())
            self.steps.append(found)
            optimizer.step()


def _copied(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.clone()


def assert_same_runs(got: Run, want: Run) -> None:
    for step, (a, b) in enumerate(zip(got.steps, want.steps, strict=True)):
        assert a.keys() == b.keys()
        for name, value in b.items():
            where = f"step {step}, {name}"
            if isinstance(value, torch.Tensor):
                assert a[name].dtype is value.dtype, where
                assert torch.equal(a[name], value), f"{where}: {a[name]} instead of {value}"
            else:
                assert a[name] == value, where


def batches(sizes: tuple[int, ...] = BATCHES) -> list[torch.Tensor]:
    seed(2)
    return [torch.randn(size, 8) for size in sizes]


def assert_trains_like_autocast(
    make: Callable[[], nn.Module],
    *,
    capture: str = "auto",
    engine: str = "dynamo",
    train: bool = True,
    sizes: tuple[int, ...] = BATCHES,
) -> nn.Module:
    """Train eagerly under torch.autocast and converted; give the converted model."""
    seed()
    eager = make().train(train)
    plain = copy.deepcopy(eager)
    model = mpgraph.convert(plain, "bf16", policy="autocast-cpu", capture=capture)

    def under_autocast(x: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return eager(x)

    data = batches(sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = Run(eager, under_autocast, data)
        got = Run(model, model, data)
    assert_same_runs(got, want)
    assert {entry.engine for entry in entries(model)} == {engine}
    return model


def entries(model: nn.Module) -> list[Any]:
    return state_of(model).specialisations()


def break_lines(model: nn.Module) -> str:
    return "\n".join(f"{b.reason} | {b.line}" for e in entries(model) for b in e.breaks)


def operators(model: nn.Module) -> set[str]:
    return {str(n.target) for e in entries(model) for gm, _ in e.graphs for n in gm.graph.nodes}


# --- Custom autograd.Functions ---------------------------------------------------------------


class CubeTimes(torch.autograd.Function):
    """A backward that no tracer could guess: seven times too large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.power = 3
        return x**ctx.power @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        g = g.float()
        return 7 * (g @ w.t()) * ctx.power * x.float() ** 2, (x.float().t() ** 3) @ g


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)


class CustomFunction(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(CubeTimes.apply(self.first(x), self.w)).sum()


class FunctionTakenEarly(CustomFunction):
    def __init__(self) -> None:
        super().__init__()
        self.f = CubeTimes.apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.f(self.first(x), self.w)).sum()


class DtypeReadInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        product = x.float() @ x.float().t()  # float32 here: no autocast in a backward pass
        scale = 3.0 if product.dtype is torch.float32 else 5.0
        return g * scale + (product @ g.float()).to(g.dtype)


class ReadsDtype(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(DtypeReadInBackward.apply(self.first(x))).sum()


class AmpFunction(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


class CustomAmpFunction(CustomFunction):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(AmpFunction.apply(self.first(x), self.w)).sum()


class WeightInAndOut(CustomFunction):
    """A parameter inside a Function and, twice, outside of it: one cast for both outside."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(self.first(x), self.w)
        h = CubeTimes.apply(h, self.w)
        return F.linear(h, self.w).sum()


class RoundFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g


class StraightThroughFunction(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(RoundFunction.apply(self.first(x) * 3)).sum()


class StraightThroughDetach(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x) * 3
        return self.second(h + (h.round() - h).detach()).sum()


class StraightThroughData(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x) * 3
        return self.second(h + (h.data.round() - h.data)).sum()


@pytest.mark.parametrize(
    "make",
    [
        CustomFunction,
        ReadsDtype,
        WeightInAndOut,
        CustomAmpFunction,
        StraightThroughFunction,
    ],
)
def test_a_custom_function_keeps_its_own_backward(make):
    model = assert_trains_like_autocast(make)
    assert any("mpgraph_function" in name for name in operators(model)), operators(model)
    assert break_lines(model) == ""


class TwoResults(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        return x * 2, x + 1

    @staticmethod
    def backward(ctx: Any, first: Any, second: Any) -> torch.Tensor:
        if first is None:
            return second * 5
        return first * 7 if second is None else first + second


class UsesOneResult(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled, _ = TwoResults.apply(self.first(x))
        _, raised = TwoResults.apply(self.second(doubled))
        return raised.sum()


@pytest.mark.parametrize("capture", ["auto", "dynamo"])
def test_a_function_that_asks_for_absent_gradients_gets_none(capture):
    model = assert_trains_like_autocast(UsesOneResult, capture=capture)
    assert "set_materialize_grads in a custom Function" in break_lines(model)
    assert "aten.linear.default" in operators(model)


def test_a_function_whose_apply_was_taken_early():
    # Traced as well by newer releases; left to eager mode by older ones.
    assert_trains_like_autocast(FunctionTakenEarly)


@pytest.mark.parametrize("make", [StraightThroughDetach, StraightThroughData])
def test_a_straight_through_estimator_without_a_function(make):
    model = assert_trains_like_autocast(make, capture="dynamo")
    assert break_lines(model) == ""


def test_the_forward_of_a_custom_function_is_rewritten():
    model = assert_trains_like_autocast(CustomFunction)
    bodies = [gm for entry in entries(model) for gm, _ in entry.graphs if gm.meta.get("body")]
    casts = [n for gm in bodies for n in gm.graph.nodes if n.meta.get("inserted")]
    assert casts, "the matrix product inside the Function takes bf16"


def test_the_policy_holds_inside_a_custom_function():
    seed()
    policy = mpgraph.Policy("default").pin(op="matmul", run="fp32")
    model = mpgraph.convert(CustomFunction(), "bf16", policy=policy, capture="dynamo")
    model(torch.randn(4, 8)).backward()
    inside = [
        node
        for entry in entries(model)
        for gm, _ in entry.graphs
        for node in gm.graph.nodes
        if str(node.target) == "aten.matmul.default"
    ]
    assert inside
    assert all(node.meta["val"].dtype is torch.float32 for node in inside)


# --- Hooks -----------------------------------------------------------------------------------


class ScalingHook(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h.register_hook(lambda g: g * 0.3)
        return self.second(h).sum()


class RecordingHook(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h.register_hook(self.seen.append)
        return self.second(h).sum()


class HookOnAParameter(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.first.weight.register_hook(lambda g: g * 0.5)
        return self.second(self.first(x)).sum()


class ForwardHook(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.means: list[float] = []
        self.first.register_forward_hook(self.note)

    def note(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        self.means.append(output.float().mean().item())
        return output * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).sum()


@pytest.mark.parametrize("make", [ScalingHook, HookOnAParameter])
def test_a_tensor_hook_acts_on_the_gradient(make):
    assert_trains_like_autocast(make)


def test_a_tensor_hook_with_a_side_effect_sees_the_same_gradients():
    model = assert_trains_like_autocast(RecordingHook)
    assert len(model.seen) == len(BATCHES)
    assert all(g.dtype is torch.bfloat16 for g in model.seen)


def test_a_module_hook_with_a_side_effect_runs_once_per_call():
    seed()
    eager = ForwardHook()
    model = mpgraph.convert(copy.deepcopy(eager), "bf16", policy="autocast-cpu", capture="dynamo")
    for x in batches():
        with torch.autocast("cpu", torch.bfloat16):
            want = eager(x)
        assert torch.equal(model(x), want)
    hook = next(iter(model.first._forward_hooks.values()))
    assert hook.__self__.means == eager.means
    assert len(eager.means) == len(BATCHES)


class MultiplyingHook(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h.register_hook(self.turn)
        return self.second(h).sum()

    def turn(self, g: torch.Tensor) -> torch.Tensor:
        turned = g.float() @ self.second.weight  # float32: no autocast in a backward pass
        return (turned * (1 if turned.dtype is torch.float32 else 5)).to(g.dtype)


def test_a_hook_computes_outside_of_autocast():
    assert_trains_like_autocast(MultiplyingHook)


traces_hooks = pytest.mark.skipif(HOOK is None, reason="this torch runs hooks in Python")


@pytest.mark.parametrize("make", [ReadsDtype, pytest.param(MultiplyingHook, marks=traces_hooks)])
def test_a_backward_that_was_traced_in_other_dtypes_is_refused(make, monkeypatch):
    # As with a release of torch whose tracing cannot be kept out of autocast.
    monkeypatch.setattr(dynamo_settings, "_BACKWARD_TRACERS", ())
    model = mpgraph.convert(make(), "bf16", capture="dynamo")
    with pytest.raises(CaptureError, match=r"(?s)other dtypes.*compiler\.disable.*\.float\(\) @"):
        model(torch.randn(4, 8))


# --- Checkpoints -----------------------------------------------------------------------------


class Checkpointed(TwoLayers):
    reentrant = False

    def block(self, h: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.second(h).relu(), 0.4, self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)
        return h.sum()


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class CheckpointedSharing(Checkpointed):
    """One layer inside two checkpoints and outside of them, as ALBERT has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = checkpoint(self.block, self.second(x), use_reentrant=False)
        h = checkpoint(self.block, h, use_reentrant=False)
        return self.first(h).sum()


class CheckpointedIsland(Checkpointed):
    def block(self, h: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            h = self.second(h.float())
        with torch.no_grad():
            scale = self.second(h).mean()
        return h * scale


class CheckpointedReentrantIsland(CheckpointedIsland):
    reentrant = True


@pytest.mark.parametrize("make", [Checkpointed, CheckpointedReentrant])
def test_a_checkpoint_draws_the_same_dropout_when_it_recomputes(make):
    model = assert_trains_like_autocast(make, capture="dynamo")
    assert any("mpgraph_checkpoint" in name for name in operators(model)), operators(model)
    assert break_lines(model) == ""


def test_auto_leaves_a_reentrant_checkpoint_to_dynamo():
    assert_trains_like_autocast(CheckpointedReentrant)


@pytest.mark.parametrize(
    "make", [CheckpointedSharing, CheckpointedIsland, CheckpointedReentrantIsland]
)
def test_checkpoints_share_casts_and_honour_regions_as_eager_does(make):
    assert_trains_like_autocast(make, capture="dynamo")


class TwoBlocks(Checkpointed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = checkpoint(self.block, self.first(x), use_reentrant=False)
        return checkpoint(self.block, h, use_reentrant=False).sum()


class TwoBlocksPlain(Checkpointed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.block(self.first(x))).sum()


@pytest.mark.parametrize("capture", ["auto", "dynamo"])
def test_a_checkpoint_keeps_only_its_inputs(capture):
    def saved(make: Callable[[], nn.Module]) -> int:
        seed()
        model = mpgraph.convert(make(), "bf16", capture=capture)
        sizes: list[int] = []
        x = torch.randn(64, 8)
        model(x)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            model(x)
        return sum(size for size in sizes if size >= 64 * 8)

    assert saved(TwoBlocks) < saved(TwoBlocksPlain)


# --- Python between graphs -------------------------------------------------------------------


class Branch(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.taken: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        positive = bool(h.sum() > 0)
        self.taken.append(positive)
        if positive:
            return self.second(h).sum()
        return self.second(self.second(h).relu()).sum() * 2


class LayerDrop(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            if random.random() < 0.5:
                x = self.first(x).relu()
        return self.second(x).sum()


class NumpyRandom(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x) * float(np.random.uniform(0.5, 1.5))
        if np.random.rand() < 0.5:
            h = self.second(h)
        return h.sum()


class NumpyNumbers(TwoLayers):
    """Numbers of numpy's where torch takes Python's, in graphs and between them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = np.sqrt(8.0)
        self.kinds: list[type] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        limit = np.log(2.0)
        jitter = torch.empty(2, dtype=x.dtype).uniform_(-limit, limit)
        h = self.first(x).view(-1, np.prod(x.shape[1:]))
        torch._dynamo.graph_break()
        self.kinds.append(type(limit))
        # A scalar of either kind: as an array of float64, the number would win.
        return h.sum() * jitter.sum() * self.scale + self.second(h).float().mean() * limit.item()


class NumpyNumberThatChanges(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.calls = np.float64(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return (self.first(x) * self.calls).sum() + self.second(x).float().mean() * self.calls


class Counter(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        h = self.first(x)
        self.average = self.average * 0.9 + h.detach().float().mean(0) * 0.1
        return (self.second(h) * self.count).sum()


def test_a_branch_on_data_takes_both_sides():
    model = assert_trains_like_autocast(Branch, sizes=(4, 4, 4, 6, 3, 5))
    assert set(model.taken) == {True, False}
    assert len(model.taken) == 6
    assert "test_capture_dynamo.py" in break_lines(model)


@pytest.mark.parametrize("make", [LayerDrop, NumpyRandom])
def test_python_random_numbers_are_drawn_at_every_call(make):
    assert_trains_like_autocast(make, sizes=(4, 4, 4, 4, 6, 6, 3))


def test_a_number_of_numpys_is_a_number_as_in_eager_mode():
    model = assert_trains_like_autocast(NumpyNumbers)
    assert set(model.kinds) == {np.float64}


def test_a_number_of_numpys_may_change_with_every_call():
    assert_trains_like_autocast(NumpyNumberThatChanges, sizes=(4,) * 6)


def test_a_counter_counts_every_call_once():
    model = assert_trains_like_autocast(Counter)
    assert model.count == len(BATCHES)


def test_a_parameter_used_before_and_after_a_break_is_cast_once():
    class Shared(TwoLayers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            torch._dynamo.graph_break()
            h = self.first(h.relu())
            torch._dynamo.graph_break()
            return self.first(h.tanh()).sum()

    model = assert_trains_like_autocast(Shared, capture="dynamo")
    assert len(entries(model)[0].graphs) >= 3


def test_what_dynamo_skips_runs_under_autocast():
    class Disabled(TwoLayers):
        @torch.compiler.disable
        def middle(self, h: torch.Tensor) -> torch.Tensor:
            assert torch.is_autocast_enabled("cpu")
            return F.linear(h, torch.eye(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.middle(self.first(x))).sum()

    model = assert_trains_like_autocast(Disabled, capture="dynamo")
    assert "disable" in break_lines(model)
    assert "self.middle(self.first(x))" in break_lines(model)


class Recurrent(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(self.first(x))[0].sum()


def test_a_recurrent_layer_is_rewritten_too():
    model = assert_trains_like_autocast(Recurrent, capture="dynamo")
    assert break_lines(model) == ""
    assert any("lstm" in name or "rnn" in name for name in operators(model)), operators(model)


# --- Regions ---------------------------------------------------------------------------------


class Islands(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        with torch.autocast("cpu", enabled=False):
            h = self.second(h.float())
            assert h.dtype is torch.float32
        with torch.autocast("cpu", torch.float16):
            h = self.second(h)
            assert h.dtype is torch.float16
        return self.first(h.float()).sum()


class BreakInIsland(TwoLayers):
    def inner(self, h: torch.Tensor) -> torch.Tensor:
        h = self.second(h)
        torch._dynamo.graph_break()
        return self.second(h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        with torch.autocast("cpu", enabled=False):
            h = self.inner(h.float())
        with torch.no_grad():
            scale = self.inner(h).float().mean()
        return (self.first(h) * scale).sum()


class NoGrad(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        with torch.no_grad():
            scale = self.second(h).softmax(-1)
        with torch.no_grad(), torch.enable_grad():
            h = self.second(h)
        return (h * scale).sum()


@pytest.mark.parametrize("make", [Islands, BreakInIsland, NoGrad])
def test_the_models_own_regions_are_honoured(make):
    assert_trains_like_autocast(make, capture="dynamo")


def test_nodes_are_marked_as_the_export_engine_marks_them():
    class Both(TwoLayers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = x.cos()
            with torch.autocast("cpu", torch.float16):
                x = x.sin()
            return self.first(x).sum()

    def marks(capture: str) -> list[tuple[Any, ...]]:
        model = mpgraph.convert(Both(), "bf16", capture=capture)
        model(torch.randn(4, 8))
        (entry,) = entries(model)
        return [
            (str(n.target), n.meta.get("grad", True), n.meta.get("region"), n.meta["module_path"])
            for n in entry.graph_module.graph.nodes
            if str(n.target).startswith("aten")
        ]

    assert marks("dynamo") == marks("export")
    assert marks("dynamo")[0][1] is False


def test_a_graph_that_fails_in_no_grad_leaves_gradients_on():
    class Picks(TwoLayers):
        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                rows = x[index]
            return self.first(rows)

    model = mpgraph.convert(Picks(), "bf16", capture="dynamo")
    x = torch.randn(4, 8)
    model(x, torch.tensor([0, 1]))
    with pytest.raises(IndexError):
        model(x, torch.tensor([0, 9]))
    assert torch.is_grad_enabled()
    assert model(x, torch.tensor([0, 1])).requires_grad


def test_calls_without_gradients():
    seed()
    eager = Branch()
    model = mpgraph.convert(copy.deepcopy(eager), "bf16", policy="autocast-cpu", capture="dynamo")
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for x in batches():
            with mode(), torch.autocast("cpu", torch.bfloat16):
                want = eager(x)
            with mode():
                got = model(x)
            assert torch.equal(got, want)
            assert got.requires_grad is want.requires_grad


# --- Everything at once ----------------------------------------------------------------------


class Everything(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.f = CubeTimes.apply
        self.count = 0

    def block(self, h: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.third(h).relu(), 0.3, self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        h = self.norm(self.first(x))
        h = h + self.f(h.to(torch.bfloat16), self.w)
        h.register_hook(lambda g: g * 0.5)
        h = checkpoint(self.block, h, use_reentrant=self.count % 2 == 0)
        if h.float().mean() > 0.1:
            h = self.second(h)
        if random.random() < 0.5:
            h = self.third(h)
        with torch.autocast("cpu", enabled=False):
            h = F.softmax(h.float(), -1)
        masks = torch.vmap(lambda row: row * (row > 0.1))(h)
        return (self.second(masks) * self.count).sum()


def test_a_model_that_mixes_all_of_it():
    model = assert_trains_like_autocast(Everything, sizes=(4, 4, 4, 6, 3, 4))
    assert model.count == 6


class Vmapped(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        rows = torch.vmap(lambda row: F.linear(row, self.second.weight).softmax(-1))(h)
        return self.second(rows).sum()


class Cond(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        # Not used again: torch.cond's first pass leaves a copy without a gradient in
        # torch.autocast's cache, and eager mode would lose the gradient of the second use.
        self.third = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h = torch.cond(h.sum() > 0, lambda h: self.third(h).relu(), lambda h: self.third(h), (h,))
        return self.second(h).sum()


@pytest.mark.parametrize("make", [Vmapped, Cond])
def test_transforms_and_control_flow_run_under_autocast(make):
    model = assert_trains_like_autocast(make, capture="dynamo")
    assert "kept whole" in break_lines(model)
    assert "test_capture_dynamo.py" in break_lines(model)


class Quiet(TwoLayers):
    """Dynamo's graph holds a call that leaves no operator behind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:2]:
            x = layer(x)
        return x.sum()


def test_a_call_that_leaves_no_trace_is_kept_by_itself(monkeypatch):
    monkeypatch.setattr(lower, "_SILENT", frozenset())
    model = assert_trains_like_autocast(Quiet, capture="dynamo")
    assert "log_api_usage_once is kept whole" in break_lines(model)
    assert "aten.linear.default" in operators(model)


def test_a_graph_that_cannot_be_rewritten_runs_under_autocast(monkeypatch):
    def refuse(*args: Any) -> None:
        raise CannotLower("for this test")

    monkeypatch.setattr(compiled, "lower", refuse)
    model = assert_trains_like_autocast(Checkpointed, capture="dynamo")
    assert "for this test" in break_lines(model)
    assert not operators(model)


def test_a_graph_for_fixed_sizes_where_a_pass_needs_them(monkeypatch):
    made: list[Any] = []
    original = compiled.lower

    def needs_numbers(gm: Any, *args: Any) -> None:
        values = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
        sizes = [v for v in values if isinstance(v, torch.SymInt) and v.node.maybe_as_int() is None]
        made.append(len(sizes))
        if sizes:
            raise NeedsStaticShapes(next(iter(gm.graph.nodes)), RuntimeError("symbolic"))
        original(gm, *args)

    monkeypatch.setattr(compiled, "lower", needs_numbers)
    assert_trains_like_autocast(CustomFunction, capture="dynamo", sizes=(4, 6, 3, 5))
    assert 1 in made


class WidenedBeforeFunction(CustomFunction):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).softmax(-1)  # bf16 under autocast on the CPU, fp32 by default
        h = checkpoint(lambda h: self.second(h).softmax(-1) @ h.t(), h, use_reentrant=False)
        return CubeTimes.apply(h @ self.first(x), self.w).sum()


def test_what_enters_and_leaves_a_body_keeps_its_dtype():
    # The body's products take bf16 as they are: nothing is cast inside.
    seed()
    model = mpgraph.convert(WidenedBeforeFunction(), "bf16", policy="default", capture="dynamo")
    model(torch.randn(4, 8)).backward()
    (outer,) = (gm for e in entries(model) for gm, _ in e.graphs if not gm.meta.get("body"))
    (call,) = (n for n in outer.graph.nodes if "mpgraph_checkpoint" in str(n.target))
    operand = call.args[1]
    assert operand.meta["val"].dtype is torch.bfloat16
    assert operand.args[0].meta["val"].dtype is torch.float32


def test_one_call_makes_one_copy_of_a_parameter():
    class Fresh(WeightCopies):
        def get_all(self, parameters: Any, dtype: torch.dtype, *_: Any) -> list[torch.Tensor]:
            return [p.to(dtype) for p in parameters]  # as on devices where copies are not kept

    copies = compiled.CallCopies(Fresh())
    parameter = nn.Parameter(torch.ones(2))
    first = copies.get_all([parameter], torch.bfloat16)[0]
    assert copies.get_all([parameter], torch.bfloat16)[0] is first
    with torch.no_grad():
        assert copies.get_all([parameter], torch.bfloat16)[0] is not first
        parameter.add_(1)
    assert copies.get_all([parameter], torch.bfloat16)[0] is not first


def test_an_override_that_matches_nothing_is_said():
    policy = mpgraph.Policy("default").pin(module="nowhere.*", run="fp32")
    model = mpgraph.convert(Branch(), "bf16", policy=policy, capture="dynamo")
    (said,) = mpgraph_warnings(lambda: model(torch.randn(4, 8)))
    assert "nowhere" in said


# --- What the user is told -------------------------------------------------------------------


def mpgraph_warnings(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in seen if str(w.message).startswith("mpgraph:")]


def test_auto_says_once_why_dynamo_carries_the_model():
    model = mpgraph.convert(CustomFunction(), "bf16")

    def run() -> None:
        for x in batches():
            model(x).backward()
        model.eval()
        model(x)

    (said,) = mpgraph_warnings(run)
    assert "CubeTimes" in said
    assert "test_capture_dynamo.py" in said
    assert "CubeTimes.apply(self.first(x), self.w)" in said


def test_dynamo_by_request_says_nothing():
    model = mpgraph.convert(CustomFunction(), "bf16", capture="dynamo")
    assert mpgraph_warnings(lambda: model(torch.randn(4, 8))) == []


def test_export_alone_refuses_what_it_would_lose():
    model = mpgraph.convert(CustomFunction(), "bf16", capture="export")
    with pytest.raises(CaptureError, match=r"(?s)CubeTimes.*self\.w.*capture='dynamo'"):
        model(torch.randn(4, 8))


def test_export_alone_refuses_a_branch_and_names_the_line():
    model = mpgraph.convert(Branch(), "bf16", capture="export")
    with pytest.raises(CaptureError, match=r"(?s)bool\(h\.sum\(\) > 0\).*capture='dynamo'"):
        model(torch.randn(4, 8))


class WrongShape(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.first(x), torch.ones(3, 5))


@pytest.mark.parametrize("capture", ["auto", "export", "dynamo"])
def test_an_error_of_the_model_is_the_one_of_eager_torch(capture):
    model = mpgraph.convert(WrongShape(), "bf16", capture=capture)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        model(torch.randn(4, 8))
    assert type(caught.value) is RuntimeError
    (note,) = caught.value.__notes__
    assert "F.linear(self.first(x), torch.ones(3, 5))" in note
    printed = "".join(traceback.format_exception(caught.value))
    assert printed.count("RuntimeError") == 1
    if capture != "dynamo":  # which has compiled the rest, and runs the operator in eager mode
        assert "torch/_dynamo" not in printed


class Refuses(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if x.shape[0] > 5:
            raise ValueError("too many rows")
        return self.first(x)


@pytest.mark.parametrize("capture", ["auto", "dynamo"])
def test_an_exception_of_the_model_stays_what_it_is(capture):
    model = mpgraph.convert(Refuses(), "bf16", capture=capture)
    with pytest.raises(ValueError, match="too many rows"):
        model(torch.randn(6, 8))
    assert model.count == 1
    assert model(torch.randn(4, 8)).dtype is torch.bfloat16


def test_an_exception_of_the_model_is_no_refusal_of_export():
    class Picky(TwoLayers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("too many rows") from KeyError("rows")

    model = mpgraph.convert(Picky(), "bf16", capture="export")
    with pytest.raises(ValueError, match="too many rows") as caught:
        model(torch.randn(6, 8))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_wrong_argument_does_not_send_the_model_to_dynamo():
    model = mpgraph.convert(nn.Linear(8, 4), "bf16")
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.randn(4, 7))
    assert mpgraph_warnings(lambda: model(torch.randn(4, 8))) == []
    assert [entry.engine for entry in entries(model)][-1] == "export"


@pytest.mark.parametrize("capture", ["auto", "export"])
def test_wrong_example_inputs_are_refused_by_convert(capture):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        mpgraph.convert(
            nn.Linear(8, 4), "bf16", capture=capture, example_inputs=(torch.randn(4, 7),)
        )


def test_asking_whether_an_error_is_the_models_own_leaves_no_trace(monkeypatch):
    class Stateful(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.count = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            x += random.random()
            return F.dropout(self.first(self.norm(x)))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("an export that fails in a new way")

    monkeypatch.setattr(engines, "capture_export", fail)
    model, x = mpgraph.convert(Stateful(), "bf16", capture="export"), torch.ones(4, 8)
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate()
    with pytest.raises(CaptureError, match="an export that fails in a new way"):
        model(x)
    assert model.count == 0
    assert torch.equal(x, torch.ones(4, 8))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


def test_asking_so_leaves_every_tensor_as_it_was(monkeypatch):
    class Writes(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.listed = [torch.zeros(8)]
            self.unit = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unit.data.add_(1)
            self.listed[0][2:].add_(1)
            self.second.bias.data = self.second.bias.data + 1
            with torch.no_grad():
                self.first.weight[0] = 0
                torch._foreach_mul_([self.first.bias, self.second.weight], 2)
            self.unit.grad = torch.ones(8)
            self.first.requires_grad_(False)
            return self.second(self.first(x)) * self.unit

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("an export that fails in a new way")

    monkeypatch.setattr(engines, "capture_export", fail)
    model = mpgraph.convert(Writes(), "bf16", capture="export")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CaptureError, match="an export that fails in a new way"):
        model(torch.ones(4, 8))
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert torch.equal(model.listed[0], torch.zeros(8))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_after_an_exception_of_the_model_the_graphs_run_again():
    model = mpgraph.convert(Refuses(), "bf16", capture="dynamo")

    def ran() -> int:
        return len([n for n in mpgraph_warnings(lambda: model(torch.randn(4, 8))) if "eager" in n])

    for _ in range(2):
        with pytest.raises(ValueError, match="too many rows"):
            model(torch.randn(6, 8))
        assert ran() == 0
        assert any("linear" in name for name in operators(model))


def test_a_failed_export_leaves_no_trace_on_the_model():
    class CountsFirst(CustomFunction):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0
            self.seen: list[int] = []
            self.nested: dict[str, list[int]] = {"seen": []}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            self.seen.append(self.count)
            self.nested["seen"].append(self.count)
            self.scale = random.random()
            self.last = self.first(x).detach()
            return super().forward(x)

    model = assert_trains_like_autocast(CountsFirst)
    assert model.seen == model.nested["seen"] == [1, 2, 3, 4]
    assert type(model.last) is torch.Tensor


def test_too_many_graphs_are_an_error_and_not_eager_mode():
    class Changes(TwoLayers):
        scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x).reshape(-1)[: int(self.scale)]

    model = mpgraph.convert(Changes(), "bf16", capture="dynamo", max_graphs=1)

    def call_often() -> None:
        for number in range(12):
            model.scale = f"{number}"
            model(torch.randn(4, 8))

    with pytest.raises(CaptureError, match=r"split this model into 8 graphs.*max_graphs"):
        call_often()


class Scaled(TwoLayers):
    """Floats from three places; the branch on data sends it to Dynamo."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor, temperature: float = 0.7) -> torch.Tensor:
        h = self.first(x) * self.factor
        if h.sum() < 1e9:
            h = h + self.factor
        return (self.second(h) / temperature).softmax(-1) * F.silu(h).mul(temperature)


def train_once(model: nn.Module, x: torch.Tensor, *args: float) -> list[torch.Tensor]:
    model.zero_grad()
    y = model(x, *args)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


def assert_floats_are_as_in_autocast(
    converted: list[nn.Module], eager: list[nn.Module], floats: list[float]
) -> None:
    x = torch.randn(4, 8)
    for model, plain in zip(converted, eager, strict=True):
        for value in floats:
            got = train_once(model, x, value)
            with torch.autocast("cpu", torch.bfloat16):
                want = train_once(plain, x, value)
            assert all(torch.equal(g.float(), w.float()) for g, w in zip(got, want, strict=True))
        for entry in entries(model):
            assert all("if h.sum() < 1e9" in b.line for b in entry.breaks)  # the one branch
            assert all(compiled.graphs for compiled in entry._compiled.values())


@pytest.mark.parametrize("capture", ["auto", "dynamo"])
def test_models_with_other_floats_and_floats_that_change_are_all_rewritten(capture):
    plain = [Scaled(0.5), Scaled(0.25), Scaled(1e-3)]
    models = [
        mpgraph.convert(copy.deepcopy(m), "bf16", policy="autocast-cpu", capture=capture)
        for m in plain
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_floats_are_as_in_autocast(models, plain, [0.7, 0.9, 1.3, 0.7])
        for number, model in enumerate([*models, *plain]):
            model.factor = 0.125 * (1 + number % 3)
        assert_floats_are_as_in_autocast(models, plain, [0.7, 0.9])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_float_that_every_call_sets_anew_costs_a_few_graphs_and_no_more(precision):
    class Anneals(TwoLayers):
        factor = 0.5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.factor = self.factor * 0.97 + 0.1
            return self.second(self.first(x) * self.factor)

    plain = Anneals()
    model = mpgraph.convert(
        copy.deepcopy(plain), precision, policy="autocast-cpu", capture="dynamo", max_graphs=16
    )
    state_of(model).scale.replace(mpgraph.LossScale(init_scale=1.0))  # like torch's
    x = torch.randn(4, 8)
    for _ in range(24):
        got = train_once(model, x)
        with torch.autocast("cpu", torch.bfloat16 if precision == "bf16" else torch.float16):
            want = train_once(plain, x)
        error = 0 if precision == "bf16" else 1e-3  # fp16 gradients are scaled, torch's are not
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.float(), w.float(), rtol=error, atol=error)
    (entry,) = entries(model)
    assert 16 // 4 < len(entry.graphs) < 8
    assert not entry.breaks


def test_a_model_of_many_graphs_may_have_several_floats():
    class Split(TwoLayers):
        factor = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x) * self.factor
            torch._dynamo.graph_break()  # (in a loop it would leave all to eager mode)
            x = self.first(x) * self.factor
            torch._dynamo.graph_break()
            x = self.first(x) * self.factor
            torch._dynamo.graph_break()
            x = self.first(x) * self.factor
            torch._dynamo.graph_break()
            return self.first(x) * self.factor

    model = mpgraph.convert(Split(), "bf16", capture="dynamo", max_graphs=16)
    for model.factor in (0.5, 0.25, 0.75):
        model(torch.randn(4, 8))
    (entry,) = entries(model)
    targets = [str(n.target) for gm, _ in entry.graphs for n in gm.graph.nodes]
    assert len(entry.graphs) == 15
    assert not any("_local_scalar_dense" in target for target in targets)


def test_floats_without_end_among_the_arguments_are_an_error_that_says_so():
    model = mpgraph.convert(Scaled(), "bf16", capture="dynamo", max_graphs=8)

    def call_often() -> None:
        for step in range(12):
            model(torch.randn(4, 8), 0.5 + step / 16)

    with pytest.warns(UserWarning, match="max_graphs"):
        with pytest.raises(CaptureError, match=r"pass changing numbers as tensors.*max_graphs"):
            call_often()


def test_what_fails_on_open_sizes_trains_all_the_same():
    class Quantiles(TwoLayers):
        count = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return (self.second(x) + self.first(x).float().quantile(0.3, -1, keepdim=True)).sum()

    model = assert_trains_like_autocast(Quantiles, sizes=(4, 6, 8))
    assert model.count == 3


def test_a_model_that_dynamo_may_not_touch_is_reported():
    class Off(TwoLayers):
        @torch.compiler.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x)

    model = mpgraph.convert(Off(), "bf16", capture="dynamo")
    (said,) = mpgraph_warnings(lambda: model(torch.randn(4, 8)))
    assert "compiled nothing" in said


def test_two_models_of_one_class_share_nothing():
    seed()
    first = mpgraph.convert(Branch(), "bf16", capture="dynamo")
    second = mpgraph.convert(Branch(), "fp32", capture="dynamo")
    x = torch.randn(4, 8)
    assert first(x).dtype is torch.float32 or first(x).dtype is torch.bfloat16
    assert second.first(x).dtype is torch.float32
    second(x)
    ours = {id(gm) for e in entries(first) for gm, _ in e.graphs}
    theirs = {id(gm) for e in entries(second) for gm, _ in e.graphs}
    assert ours
    assert theirs
    assert not ours & theirs
    casts = [n for e in entries(second) for gm, _ in e.graphs for n in gm.graph.nodes]
    assert not any(n.meta.get("inserted") for n in casts)


def test_nodes_know_their_module_on_both_sides_of_a_break():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Branch()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = mpgraph.convert(Outer(), "bf16", capture="dynamo")
    model(torch.randn(4, 8))
    paths = {
        node.meta["module_path"]
        for entry in entries(model)
        for gm, _ in entry.graphs
        for node in gm.graph.nodes
        if str(node.target) == "aten.linear.default"
    }
    assert paths == {"inner.first", "inner.second"}


def test_gradients_accumulate_over_two_calls():
    seed()
    eager = Branch()
    model = mpgraph.convert(copy.deepcopy(eager), "bf16", policy="autocast-cpu", capture="dynamo")
    for x in batches():
        with torch.autocast("cpu", torch.bfloat16):
            loss = eager(x)
        loss.backward()
        model(x).backward()
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_converted_model_inside_another_runs_plainly():
    inner = mpgraph.convert(nn.Linear(8, 8), "bf16")

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner
            self.outer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inner(x)
            torch._dynamo.graph_break()
            return self.outer(h).sum()

    assert_trains_like_autocast(Outer, capture="dynamo")


class AsksWhetherItIsCompiled(TwoLayers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        asked = (torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling)
        if any(ask() for ask in asked) or torch._dynamo.is_compiling():
            return self.second(h.float() * 3)
        return self.second(h if h.sum() < 1e9 else -h)


def test_a_model_that_asks_is_told_that_it_runs_eagerly():
    seed()
    plain = AsksWhetherItIsCompiled()
    model = mpgraph.convert(copy.deepcopy(plain), "bf16", policy="autocast-cpu", capture="dynamo")
    x = torch.randn(4, 8)
    got = train_once(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        want = train_once(plain, x)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_to_ask_whether_a_stream_is_captured_breaks_no_graph(device):
    class Asks(TwoLayers):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if getattr(torch, device).is_current_stream_capturing():
                return self.first(x)
            return self.second(self.first(x))

    model = mpgraph.convert(Asks(), "bf16", capture="dynamo")
    model(torch.randn(4, 8))
    (entry,) = entries(model)
    assert len(entry.graphs) == 1
    assert not entry.breaks
