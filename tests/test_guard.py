"""guard: which steps are skipped, what they leave untouched, and how the scale moves."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import mpgraph
from mpgraph.module import state_of

from . import resume_worker

aten = torch.ops.aten
inf, nan = float("inf"), float("nan")
OPTIMIZERS: dict[str, Any] = {
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-single": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def net(width: int = 4) -> nn.Module:
    return mpgraph.convert(
        nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2)), "fp16"
    )


def scale_of(model: nn.Module) -> float:
    return state_of(model).scale.value.scale.item()


def backward(model: nn.Module, fill: float = 1.0, seed: int = 0) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    (model(x).square().mean() * fill).backward()


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*parameters, *state)]


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- skipping ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [inf, -inf, nan, 1e6])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_leaves_everything_as_it_was(name, bad):
    model = net()
    optimizer = mpgraph.guard(OPTIMIZERS[name](model.parameters()), model)
    backward(model)
    optimizer.step()
    assert not optimizer.last_step_skipped
    before, scale = everything(optimizer), scale_of(model)

    optimizer.zero_grad()
    backward(model, bad)
    optimizer.step()
    assert optimizer.last_step_skipped
    assert_equal(everything(optimizer), before)
    assert scale_of(model) == scale / 2

    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    assert not optimizer.last_step_skipped
    assert not torch.equal(everything(optimizer)[0], before[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_guarded_steps_are_the_optimizers_own(name):
    model = net()
    reference = copy.deepcopy(model)
    optimizer = mpgraph.guard(OPTIMIZERS[name](model.parameters()), model)
    plain = OPTIMIZERS[name](reference.parameters())
    for seed in range(4):
        for m, o in ((model, optimizer), (reference, plain)):
            o.zero_grad()
            backward(m, seed=seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                o.step()
    assert_equal(everything(optimizer), everything(plain))


FUSED: dict[str, Any] = {
    "adam": lambda p, fused: torch.optim.Adam(p, lr=0.01, amsgrad=True, fused=fused),
    "adamw": lambda p, fused: torch.optim.AdamW(p, lr=0.01, fused=fused),
    "adagrad": lambda p, fused: torch.optim.Adagrad(p, lr=0.01, fused=fused),
    "sgd": lambda p, fused: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=fused),
    "sgd-nesterov": lambda p, fused: torch.optim.SGD(
        p, lr=0.01, momentum=0.9, nesterov=True, fused=fused
    ),
}


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # with it, torch fills what empty_like gives
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_optimizer_may_overflow_at_its_very_first_steps(name):
    torch.manual_seed(0)
    model = net()
    reference = copy.deepcopy(model)
    optimizer = mpgraph.guard(FUSED[name](model.parameters(), True), model)
    plain = FUSED[name](reference.parameters(), False)
    for step in range(6):
        for m, o in ((model, optimizer), (reference, plain)):
            o.zero_grad()
            backward(m, inf if step < 2 and m is model else 1.0, seed=step)
        optimizer.step()
        assert bool(optimizer.last_step_skipped) == (step < 2)
        if step >= 2:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plain.step()
    for got, one in zip(everything(optimizer), everything(plain), strict=True):
        torch.testing.assert_close(got, one, rtol=1e-6, atol=1e-7)


class CountSyncs:
    """Counts how often a value is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))

    def _counting(self, original: Any) -> Any:
        def counted(*args: Any) -> Any:
            self.count += 1
            return original(*args)

        return counted


@pytest.mark.parametrize(("name", "syncs"), [("adamw-fused", 0), ("sgd-fused", 0), ("sgd", 1)])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}])
def test_nobody_waits_for_a_fused_optimizer_and_others_once(monkeypatch, name, syncs, options):
    model = net()
    optimizer = mpgraph.guard(OPTIMIZERS[name](model.parameters()), model, **options)
    backward(model)
    optimizer.step()
    backward(model, inf)
    counter = CountSyncs(monkeypatch)
    optimizer.step()
    assert counter.count == syncs


class NoSyncs(TorchDispatchMode):
    """Refuses every operator whose result the host has to wait for."""

    SYNCS = frozenset(
        {
            *(aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default),
            *(aten.nonzero.default, aten.masked_select.default, aten._unique2.default),
        }
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.SYNCS, f"the host waits for {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adamw-fused", "sgd-fused"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}])
def test_a_whole_fused_step_makes_nobody_wait(name, options):
    model = net()
    optimizer = mpgraph.guard(OPTIMIZERS[name](model.parameters()), model, **options)
    backward(model)
    optimizer.step()
    for fill in (1.0, inf, 1.0):
        with NoSyncs():
            optimizer.zero_grad()
            backward(model, fill)
            optimizer.step()
        assert bool(optimizer.last_step_skipped) == (fill == inf)


@pytest.mark.parametrize("wait", [Tensor.item, bool, float, Tensor.nonzero])
def test_a_wait_would_be_noticed(wait, monkeypatch):
    model = net()
    optimizer = mpgraph.guard(OPTIMIZERS["adamw-fused"](model.parameters()), model)
    backward(model)
    optimizer.step()
    find = vars(optimizer)["mpgraph"].find
    monkeypatch.setattr(vars(optimizer)["mpgraph"], "find", lambda g: (wait(f := find(g)), f)[1])
    with pytest.raises(AssertionError, match="the host waits"), NoSyncs():
        optimizer.step()


def test_one_group_that_is_not_fused_takes_the_other_way():
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "fused": False}]
    optimizer = mpgraph.guard(torch.optim.AdamW(groups, fused=True), model)
    backward(model, inf)
    before = everything(optimizer)
    optimizer.step()
    assert optimizer.last_step_skipped is True
    assert_equal(everything(optimizer), before)


def test_an_overflow_in_any_group_skips_all_of_them():
    model = net()
    groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(model.parameters())]
    optimizer = mpgraph.guard(torch.optim.SGD(groups), model)
    backward(model)
    list(model.parameters())[2].grad[0, 0] = nan
    before = everything(optimizer)
    optimizer.step()
    assert_equal(everything(optimizer), before)


def test_sparse_gradients_are_checked():
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2)

        def forward(self, i: Tensor) -> Tensor:
            return self.head(self.table(i))

    model = mpgraph.convert(Lookup(), "fp16")
    optimizer = mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.1), model)
    index = torch.tensor([1, 1, 3])
    model(index).mean().backward()
    assert model.table.weight.grad.is_sparse
    optimizer.step()
    assert not optimizer.last_step_skipped
    before = everything(optimizer)
    optimizer.zero_grad()
    (model(index).sum() * inf).backward()
    optimizer.step()
    assert optimizer.last_step_skipped
    assert_equal(everything(optimizer), before)


def test_a_step_without_gradients_moves_nothing():
    model = net()
    optimizer = mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.1), model)
    optimizer.step()
    assert not optimizer.last_step_skipped
    assert state_of(model).scale.value.growth_tracker.item() == 0
    backward(model, inf)
    optimizer.step()
    assert optimizer.last_step_skipped
    scale = scale_of(model)
    optimizer.zero_grad()
    optimizer.step()
    assert not optimizer.last_step_skipped
    assert scale_of(model) == scale


def test_an_optimizer_of_somebody_elses_is_guarded():
    class Lion(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.01})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["m"] = state.get("m", torch.zeros_like(p)) * 0.9 + p.grad
                    p -= group["lr"] * state["m"].sign()

    model = net()
    optimizer = mpgraph.guard(Lion(model.parameters()), model)
    backward(model)
    optimizer.step()
    before = everything(optimizer)
    backward(model, nan)
    optimizer.step()
    assert optimizer.last_step_skipped
    assert_equal(everything(optimizer), before)


# --- closures ------------------------------------------------------------------------------


def test_lbfgs_steps_as_unguarded():
    model = net()
    reference = copy.deepcopy(model)
    optimizer = mpgraph.guard(torch.optim.LBFGS(model.parameters(), max_iter=4), model)
    plain = torch.optim.LBFGS(reference.parameters(), max_iter=4)
    for _ in range(3):
        losses = [optimizer.step(closure(model, optimizer))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses.append(plain.step(closure(reference, plain)))
        assert torch.equal(*losses)
    assert_equal(everything(optimizer), everything(plain))


def closure(model: nn.Module, optimizer: torch.optim.Optimizer, spoil: Any = lambda: 1.0) -> Any:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean() * spoil()
        loss.backward()
        return loss

    return evaluate


@pytest.mark.parametrize("evaluations", [1, 3])
def test_lbfgs_is_put_back_if_any_evaluation_overflows(evaluations):
    model = net()
    optimizer = mpgraph.guard(torch.optim.LBFGS(model.parameters(), max_iter=4), model)
    optimizer.step(closure(model, optimizer))
    before, state = everything(optimizer), copy.deepcopy(list(optimizer.state.values()))
    count = [0]

    def spoil() -> float:
        count[0] += 1
        return nan if count[0] == evaluations else 1.0

    scale = scale_of(model)
    assert optimizer.step(closure(model, optimizer, spoil)).isnan()
    assert optimizer.last_step_skipped
    assert_equal(everything(optimizer), before)
    for got, want in zip(optimizer.state.values(), state, strict=True):
        assert_equal(got["old_dirs"], want["old_dirs"])
        assert got["n_iter"] == want["n_iter"]
    assert scale_of(model) == scale / 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closure_of_an_ordinary_optimizer_is_checked(name):
    model = net()
    optimizer = mpgraph.guard(OPTIMIZERS[name](model.parameters()), model)
    loss = optimizer.step(closure(model, optimizer))
    assert loss.isfinite()
    before = everything(optimizer)
    optimizer.step(closure(model, optimizer, lambda: inf))
    assert optimizer.last_step_skipped
    assert_equal(everything(optimizer), before)


def test_an_optimizer_that_moves_before_its_closure_is_put_back():
    class Probing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p += 0.25
                    self.state[p]["moved"] = torch.ones(())
            with torch.enable_grad():
                return closure()

    model = net()
    optimizer = mpgraph.guard(Probing(model.parameters(), lr=0.1), model)
    before = everything(optimizer)
    optimizer.step(closure(model, optimizer, lambda: inf))
    assert_equal(everything(optimizer), before)


# --- clipping ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw-fused", "sgd"])
def test_max_grad_norm_clips_as_torch_does(name):
    model = net()
    reference = copy.deepcopy(model)
    optimizer = mpgraph.guard(OPTIMIZERS[name](model.parameters()), model, max_grad_norm=0.01)
    plain = OPTIMIZERS[name](reference.parameters())
    backward(model)
    optimizer.step()
    backward(reference)
    nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.step()
    assert_equal(everything(optimizer), everything(plain))
    backward(model, inf)
    before = everything(optimizer)
    optimizer.step()
    assert optimizer.last_step_skipped
    assert_equal(everything(optimizer), before)


def test_clipping_before_the_step_sees_true_gradients():
    torch.manual_seed(0)
    model = net()
    exact = copy.deepcopy(nn.Sequential(*model)).double()
    backward(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    exact(x).square().mean().backward()
    want = nn.utils.clip_grad_norm_(exact.parameters(), 0.01)
    torch.testing.assert_close(norm.double(), want, rtol=2e-3, atol=0)


# --- several models and optimizers ---------------------------------------------------------


def test_one_optimizer_moves_the_scales_of_all_its_models():
    first, second = net(), net()
    parameters = [*first.parameters(), *second.parameters()]
    optimizer = mpgraph.guard(torch.optim.SGD(parameters, lr=0.1), first, second, scale=8.0)
    backward(first)
    backward(second, inf)
    optimizer.step()
    assert scale_of(first) == scale_of(second) == 4.0


@pytest.mark.parametrize("bad", [(), (0,), (1,), (0, 1)])
def test_two_optimizers_of_one_model_count_as_one_step(bad):
    model = net()
    rule = mpgraph.LossScale(init_scale=8.0, growth_interval=2)
    optimizers = [
        mpgraph.guard(torch.optim.SGD(part.parameters(), lr=0.1), model)
        for part in (model[0], model[2])
    ]
    state_of(model).scale.replace(rule)
    backward(model)
    for index, part in enumerate((model[0], model[2])):
        if index in bad:
            part.weight.grad[0, 0] = inf
    for optimizer in optimizers:
        optimizer.step()
    assert [bool(o.last_step_skipped) for o in optimizers] == [i in bad for i in range(2)]
    assert scale_of(model) == (4.0 if bad else 8.0)
    assert state_of(model).scale.value.growth_tracker.item() == (0 if bad else 1)
    model.zero_grad()
    backward(model)
    optimizers[1].step()
    assert state_of(model).scale.value.growth_tracker.item() == (1 if bad else 0)


def test_an_evaluation_between_two_optimizers_changes_nothing():
    model = net()
    optimizers = [
        mpgraph.guard(torch.optim.SGD(part.parameters(), lr=0.1), model)
        for part in (model[0], model[2])
    ]
    backward(model)
    optimizers[0].step()
    with torch.no_grad():
        model(torch.ones(3, 4))
    optimizers[1].step()
    assert state_of(model).scale.value.growth_tracker.item() == 1


class Around(nn.Module):
    """An ordinary model, or a wrapper, with two converted parts."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(net(4), nn.Linear(2, 4), net(8))


def test_converted_parts_are_found_in_an_ordinary_model():
    outer = Around()
    optimizer = mpgraph.guard(torch.optim.SGD(outer.parameters(), lr=0.1), outer, scale=8.0)
    outer.module(torch.ones(3, 4)).mean().mul(inf).backward()
    optimizer.step()
    assert scale_of(outer.module[0]) == scale_of(outer.module[2]) == 4.0
    assert len(optimizer.state_dict()["mpgraph"]["scales"]) == 2


def test_models_that_gradients_only_pass_through_may_be_guarded_too():
    generator, critic = net(), net()
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    mpgraph.guard(optimizer, generator, critic)
    critic(torch.cat([generator(torch.ones(3, 4))] * 2, -1)).mean().backward()
    optimizer.step()
    for model in (generator, critic):
        assert state_of(model).scale.value.growth_tracker.item() == 1


# --- the scale across an accumulation window, copies and checkpoints -----------------------


def test_micro_batches_with_different_scales_add_up():
    model = net()
    x = torch.randn(3, 4)
    model(x).square().mean().backward()
    once = [p.grad.clone() for p in model.parameters()]
    state_of(model).scale.replace(mpgraph.LossScale(init_scale=4.0))
    model(x).square().mean().backward()
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g, rtol=2e-3, atol=1e-5)


def test_a_scale_that_moves_between_forward_and_backward_does_no_harm():
    model = net()
    optimizer = mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.0), model)
    backward(model)
    want = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    loss = model(x).square().mean()
    model[0].weight.grad = torch.full_like(model[0].weight, inf)
    optimizer.step()
    assert optimizer.last_step_skipped
    optimizer.zero_grad()
    loss.backward()
    assert_equal([p.grad for p in model.parameters()], want)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_model_has_the_same_scale_and_moves_by_itself(copied):
    model = net()
    optimizer = mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.1), model, scale=8.0)
    twin = copied(model)
    assert scale_of(twin) == 8.0
    backward(model, inf)
    optimizer.step()
    assert (scale_of(model), scale_of(twin)) == (4.0, 8.0)
    assert not state_of(twin).scale.is_guarded


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_same_bits(name):
    rule = mpgraph.LossScale(init_scale=2.0**10, growth_interval=3)
    spoiled = {2, 3, 8}

    def train(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            backward(model, inf if step in spoiled else 1.0, seed=step)
            optimizer.step()

    torch.manual_seed(1)
    model = net()
    optimizer = mpgraph.guard(OPTIMIZERS[name](model.parameters()), model, scale=rule)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, range(5, 12))

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = net()
    resumed.load_state_dict(weights)
    again = mpgraph.guard(OPTIMIZERS[name](resumed.parameters()), resumed)
    again.load_state_dict(state)
    train(resumed, again, range(5, 12))
    assert_equal(everything(again), everything(optimizer))
    got, want = (state_of(m).scale.value.state_dict() for m in (resumed, model))
    assert got == want
    assert got["scale"].item() != 2.0**10


@pytest.mark.parametrize(("name", "first"), [("adamw", "guard"), ("sgd", "load")])
def test_a_run_resumed_in_a_new_process_has_the_same_bits(tmp_path, monkeypatch, name, first):
    monkeypatch.chdir(tmp_path)
    resume_worker.main(name, first, "-", "0", "12", "whole.pt")
    resume_worker.main(name, first, "-", "0", "5", "half.pt")
    command = [sys.executable, resume_worker.__file__, name, first, "half.pt", "5", "12"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, "resumed.pt"], env=environment, check=True)
    half, whole, resumed = (
        torch.load(tmp_path / f"{part}.pt", weights_only=True)
        for part in ("half", "whole", "resumed")
    )
    got, want = (pytree.tree_flatten(saved) for saved in (resumed, whole))
    assert got[1] == want[1]
    for one, other in zip(got[0], want[0], strict=True):
        assert torch.equal(one, other) if isinstance(other, Tensor) else one == other
    (scale,), (before,) = (s[1]["mpgraph"]["scales"] for s in (whole, half))
    assert scale["scale"] != before["scale"]
    assert before["growth_tracker"].item() == 1  # it stopped in the middle of an interval


@pytest.mark.parametrize("name", ["adamw-fused", "sgd"])
def test_an_optimizer_may_be_guarded_after_it_was_loaded(name):
    model = net()
    optimizer = mpgraph.guard(OPTIMIZERS[name](model.parameters()), model, scale=8.0)
    backward(model, inf)
    optimizer.step()
    backward(model)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)

    file.seek(0)
    resumed = net()
    plain = OPTIMIZERS[name](resumed.parameters())
    plain.load_state_dict(torch.load(file, weights_only=True))
    again = mpgraph.guard(plain, resumed, scale=2.0)
    got, want = (state_of(m).scale.value.state_dict() for m in (resumed, model))
    assert got == want
    assert got["scale"].item() == 4.0
    for group in (again.param_groups[0], optimizer.param_groups[0]):
        assert "mpgraph" not in group


def test_a_state_is_loaded_whichever_place_holds_the_scale():
    model = net()
    optimizer = mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.1), model, scale=8.0)
    whole = optimizer.state_dict()
    bare = {key: whole[key] for key in ("state", "param_groups")}  # as torch's own tools keep it
    state_of(model).scale.replace(mpgraph.LossScale(init_scale=2.0))
    optimizer.load_state_dict(bare)
    assert scale_of(model) == 8.0
    assert "mpgraph" not in optimizer.param_groups[0]
    assert "mpgraph" in bare["param_groups"][0]


def test_a_checkpoint_without_a_scale_says_so():
    model = net()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    state = plain.state_dict()
    optimizer = mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.1), model, scale=8.0)
    with pytest.warns(UserWarning, match=r"saved without mpgraph\.guard.*stays as it is"):
        optimizer.load_state_dict(state)
    assert scale_of(model) == 8.0


def test_a_checkpoint_of_other_models_is_refused():
    first, second = net(), net()
    state = mpgraph.guard(torch.optim.SGD(first.parameters(), lr=0.1), first, second).state_dict()
    optimizer = mpgraph.guard(torch.optim.SGD(first.parameters(), lr=0.1), first)
    with pytest.raises(mpgraph.PrecisionError, match=r"scales of 2 models.*guards 1"):
        optimizer.load_state_dict(state)


# --- around it -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["guard first", "scheduler first", "both"])
def test_schedulers_and_guard_go_together_in_any_order(order):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedulers = []
    if order != "guard first":
        schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    mpgraph.guard(optimizer, model)
    if order != "scheduler first":
        schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fill in (inf, 1.0):
            before = everything(optimizer)
            optimizer.zero_grad()
            backward(model, fill)
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
            assert bool(optimizer.last_step_skipped) == (fill == inf)
            assert torch.equal(everything(optimizer)[0], before[0]) == (fill == inf)
    assert optimizer.param_groups[0]["lr"] == 0.25 ** len(schedulers)


def test_bf16_models_are_checked_on_request():
    model = mpgraph.convert(nn.Linear(4, 2), "bf16")
    optimizer = mpgraph.guard(
        torch.optim.AdamW(model.parameters(), fused=True), model, check_finite=True
    )
    before = everything(optimizer)
    (model(torch.ones(3, 4)).float().sum() * inf).backward()
    optimizer.step()
    assert optimizer.last_step_skipped
    assert_equal(everything(optimizer)[:2], before)
    assert optimizer.state_dict()["mpgraph"] == {"scales": []}


def test_forgetting_the_guard_is_said_once():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    with pytest.warns(UserWarning, match=r"trains in fp16 without a guard.*guard\(optimizer"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_forgetting_the_guard_of_a_copy_is_said_once(copied):
    model = net()
    mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.1), model)
    twin = copied(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    backward(twin)
    with pytest.warns(UserWarning, match="trains in fp16 without a guard") as said:
        optimizer.step()
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin(torch.ones(4)).sum().backward()  # another kind of call is captured
        optimizer.step()


def test_a_model_that_is_converted_again_keeps_its_scale():
    model = net()
    optimizer = mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.1), model, scale=8.0)
    backward(model, inf)
    optimizer.step()
    optimizer.zero_grad()
    other = mpgraph.convert(model, "fp16", policy="autocast-cpu")
    mpgraph.convert(model, "fp16", policy="autocast-cpu", inplace=True)
    assert scale_of(model) == scale_of(other) == 4.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is still guarded
        backward(model, inf)
        optimizer.step()
    assert (scale_of(model), scale_of(other)) == (2.0, 4.0)


def test_nothing_is_said_where_nothing_is_forgotten():
    original = nn.Linear(4, 2)
    model = mpgraph.convert(original, "fp16")
    guarded = net()
    optimizer = mpgraph.guard(torch.optim.SGD(guarded.parameters(), lr=0.1), guarded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(torch.ones(3, 4))  # inference in fp16, while the original trains in fp32
        original(torch.ones(3, 4)).sum().backward()
        torch.optim.SGD(original.parameters(), lr=0.1).step()
        backward(guarded)
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw-fused", "sgd"])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("fill", [1.0, inf])
def test_a_grad_scaler_around_a_guard_is_refused(name, scheduled, fill):
    model = net()
    optimizer = mpgraph.guard(OPTIMIZERS[name](model.parameters()), model)
    if scheduled:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.ones(3, 4)).mean() / 8 * fill).backward()
    with pytest.raises(mpgraph.PrecisionError, match=r"scaled twice.*Leave the scaler out"):
        scaler.step(optimizer)


def test_a_grad_scaler_that_is_disabled_does_no_harm():
    model = net()
    optimizer = mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.1), model)
    backward(model)
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    assert not optimizer.last_step_skipped


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_what_does_not_fit_is_refused():
    model, other, plain = net(), net(), nn.Linear(4, 2)
    bf16 = mpgraph.convert(nn.Linear(4, 2), "bf16")
    optimizer = mpgraph.guard(sgd(model), model)
    refused = [
        (lambda: mpgraph.guard(optimizer, model), "guarded already.*Guard it once, with all"),
        (lambda: mpgraph.guard(sgd(model)), "no fp16 model to guard.*check_finite=True"),
        (lambda: mpgraph.guard(sgd(bf16), bf16), "no fp16 model to guard"),
        (lambda: mpgraph.guard(sgd(other), model), "holds none of the parameters of"),
        (lambda: mpgraph.guard(model, sgd(model)), "the optimizer first"),
        (lambda: mpgraph.guard(sgd(plain), plain), "expected a module from mpgraph.convert"),
        (lambda: mpgraph.guard(sgd(model), model, max_grad_norm=0), "must be positive"),
        (lambda: mpgraph.guard(sgd(model), model, scale=3.0), "must be a power of two"),
    ]
    for call, message in refused:
        with pytest.raises(mpgraph.MPGraphError, match=message):
            call()


def test_a_model_on_its_way_through_another_keeps_true_gradients():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    exact = copy.deepcopy(inner).double()
    converted = mpgraph.convert(inner, "fp16")
    x = torch.randn(3, 4, requires_grad=True)
    hidden = x * 3
    (F.softplus(converted(hidden)) * 1e-7).sum().backward()
    want_x = x.detach().double().requires_grad_()
    (F.softplus(exact(want_x * 3)) * 1e-7).sum().backward()
    torch.testing.assert_close(x.grad.double(), want_x.grad, rtol=5e-3, atol=1e-11)


def test_a_grad_scaler_around_an_fp16_model_without_a_guard_is_refused() -> None:
    model = mpgraph.convert(nn.Linear(2, 2), "fp16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.ones(1, 2)).float().mean() / 64).backward()
    with pytest.raises(
        mpgraph.PrecisionError, match="scales by itself: gradients would be scaled twice"
    ):
        scaler.step(optimizer)
