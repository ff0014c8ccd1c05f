"""TrainStep while something changes between its calls, or happens inside of the loss function."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

import mpgraph
from mpgraph import CaptureError, PrecisionError
from mpgraph.module import state_of
from mpgraph.step.reads import LossReads

np = pytest.importorskip("numpy")


class Net(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores."""
        return self.last(self.drop(torch.relu(self.first(x))))


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss."""
    return F.cross_entropy(model(x).float(), y)


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same batch for the same index."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(5, 6, generator=generator)
    return x, torch.randint(0, 3, (5,), generator=generator)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Without kernels that compute in another order."""
    return torch.optim.AdamW(parameters, lr=1e-2, foreach=False)


class Twins:
    """A step, and the loop that it replaces, from the same weights."""

    def __init__(
        self,
        loss: Callable[..., Any] = loss_fn,
        precision: str = "bf16",
        model: Callable[[], nn.Module] = Net,
        make: Callable[[Any], torch.optim.Optimizer] = adamw,
    ) -> None:
        torch.manual_seed(0)
        first = model()
        second = copy.deepcopy(first)
        self.loss, self.optimizers = loss, (make(first.parameters()), make(second.parameters()))
        self.step = mpgraph.TrainStep(
            first, self.optimizers[0], loss, precision=precision, policy="autocast-cpu",
            compile=False,
        )  # fmt: skip
        self.loop = mpgraph.convert(second, precision, policy="autocast-cpu")
        if precision == "fp16":
            mpgraph.guard(self.optimizers[1], self.loop)
        self.models: Any = (self.step.model, self.loop)
        self.index = 0

    def take(self, count: int = 2, given: Callable[[int], tuple[Any, ...]] = batch) -> None:
        """Steps of both; everything that they return and write is equal, to the bit."""
        for _ in range(count):
            self.index += 1
            torch.manual_seed(self.index)
            got = self.step(*given(self.index))
            torch.manual_seed(self.index)
            want = self.loss(self.loop, *given(self.index))
            want.backward()
            self.optimizers[1].step()
            self.loop.zero_grad()
            assert_same(got, want.detach())
            self.compare()

    def compare(self) -> None:
        """Parameters, buffers and the optimizers' states."""
        for p, q in zip(*(m.state_dict().values() for m in self.models), strict=True):
            assert_same(p, q)
        for p, q in zip(*(map(_parameters, self.optimizers)), strict=True):
            ours, theirs = self.optimizers[0].state.get(p, {}), self.optimizers[1].state.get(q, {})
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                assert_same(ours[key], value)


def _parameters(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype is want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


# What changes between two calls


def replace_parameter(twins: Twins) -> None:
    weight = torch.randn(8, 6)
    for model in twins.models:
        model.first.weight = nn.Parameter(weight.clone())


def add_group(twins: Twins) -> None:
    for model, optimizer in zip(twins.models, twins.optimizers, strict=True):
        torch.manual_seed(7)
        model.last = nn.Linear(8, 3)
        optimizer.add_param_group({"params": [*model.last.parameters()]})


def remove_parameter(twins: Twins) -> None:
    for optimizer in twins.optimizers:
        optimizer.param_groups[0]["params"].pop()


def set_group(key: str, value: Any) -> Callable[[Twins], None]:
    def change(twins: Twins) -> None:
        for optimizer in twins.optimizers:
            optimizer.param_groups[0][key] = copy.deepcopy(value)

    return change


def evaluate(twins: Twins) -> None:
    for model in twins.models:
        model.eval()


def freeze(twins: Twins) -> None:
    for model in twins.models:
        model.first.weight.requires_grad_(False)


def load(twins: Twins) -> None:
    state = {name: value * 2 for name, value in twins.loop.state_dict().items()}
    moments = copy.deepcopy(twins.optimizers[1].state_dict())
    for model, optimizer in zip(twins.models, twins.optimizers, strict=True):
        model.load_state_dict(state)
        optimizer.load_state_dict(copy.deepcopy(moments))


def hook_gradient(twins: Twins) -> None:
    for model in twins.models:
        model.first.weight.register_hook(lambda g: g * 2)


def hook_model(twins: Twins) -> None:
    for model in twins.models:
        model.register_forward_hook(lambda module, args, out: out * 2)


def spoil_state(twins: Twins) -> None:
    for optimizer in twins.optimizers:
        optimizer.state[_parameters(optimizer)[0]]["exp_avg"][0, 0] = float("nan")


@pytest.mark.parametrize(
    "change",
    [
        replace_parameter, add_group, remove_parameter, evaluate, freeze, load, hook_gradient,
        hook_model, spoil_state, set_group("lr", torch.tensor(3e-2)), set_group("lr", 1),
        set_group("weight_decay", 0.0), set_group("betas", (0.5, 0.9)), set_group("maximize", True),
    ],
)  # fmt: skip
def test_what_changes_between_steps_is_seen(change: Callable[[Twins], None]) -> None:
    twins = Twins()
    twins.take()
    change(twins)
    twins.take()


def test_the_loss_scale_goes_on_where_it_is_when_a_group_is_added() -> None:
    """Its first step is one that the optimizer takes itself, as that of the others was."""
    twins = Twins(precision="fp16")
    twins.take(3)
    add_group(twins)
    twins.take(2)
    ours, theirs = (state_of(model).scale.value for model in twins.models)
    assert ours.growth_tracker == theirs.growth_tracker == 5
    assert ours.scale == theirs.scale


def test_a_frozen_parameter_is_trained_once_it_is_free() -> None:
    twins = Twins()
    freeze(twins)
    twins.take()
    for model in twins.models:
        model.first.weight.requires_grad_(True)
    twins.take()


def test_a_tensor_learning_rate_is_read_at_every_step() -> None:
    twins = Twins()
    set_group("lr", torch.tensor(3e-2))(twins)
    twins.take(3)
    for optimizer in twins.optimizers:
        optimizer.param_groups[0]["lr"].fill_(1e-3)
    twins.take()
    set_group("lr", 1e-2)(twins)
    twins.take()


def test_a_model_that_was_made_half_is_refused() -> None:
    twins = Twins()
    twins.take()
    twins.step.model.half()
    with pytest.raises(PrecisionError, match=r"'first\.weight' is now fp16"):
        twins.step(*batch(0))


def test_an_optimizer_that_has_lost_the_model_is_refused() -> None:
    twins = Twins()
    twins.take()
    state = copy.deepcopy(twins.step.model.state_dict())
    twins.step.model.load_state_dict(state, assign=True)
    with pytest.raises(PrecisionError, match="holds none of the parameters of Net"):
        twins.step(*batch(0))


# What a loss function reads

factor = 1.0


def by_global() -> tuple[Callable[..., Any], Callable[[], None]]:
    globals()["factor"] = 1.0

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return loss_fn(model, x, y) * factor

    return loss, lambda: globals().update(factor=3.0)


def by_closure() -> tuple[Callable[..., Any], Callable[[], None]]:
    weight = 1.0

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return loss_fn(model, x, y) * weight

    def change() -> None:
        nonlocal weight
        weight = 3.0

    return loss, change


def by_dict() -> tuple[Callable[..., Any], Callable[[], None]]:
    weights = {"main": [1.0]}

    def scaled(value: Any) -> Any:
        return value * weights["main"][0]

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return scaled(loss_fn(model, x, y))

    return loss, lambda: weights.update(main=[3.0])


def by_default() -> tuple[Callable[..., Any], Callable[[], None]]:
    def loss(model: nn.Module, x: Any, y: Any, weight: float = 1.0) -> Any:
        return loss_fn(model, x, y) * weight

    return loss, lambda: setattr(loss, "__defaults__", (3.0,))


def by_tensor() -> tuple[Callable[..., Any], Callable[[], None]]:
    weight = torch.tensor(1.0)

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return loss_fn(model, x, y) * weight

    def change() -> None:
        nonlocal weight
        weight = torch.tensor(3.0)

    return loss, change


class Weighted:
    """A loss with a number of its own, in an object that has others."""

    def __init__(self) -> None:
        self.weight, self.calls = 1.0, 0

    def __call__(self, model: nn.Module, x: Any, y: Any) -> Any:
        return loss_fn(model, x, y) * self.weight

    def method(self, model: nn.Module, x: Any, y: Any) -> Any:
        return self(model, x, y)

    def change(self) -> None:
        self.weight = 3.0


def by_object() -> tuple[Callable[..., Any], Callable[[], None]]:
    made = Weighted()
    return made, made.change


def by_method() -> tuple[Callable[..., Any], Callable[[], None]]:
    made = Weighted()
    return made.method, made.change


def by_partial() -> tuple[Callable[..., Any], Callable[[], None]]:
    made = Weighted()
    return functools.partial(_weighted, made), made.change


def _weighted(made: Weighted, model: nn.Module, x: Any, y: Any) -> Any:
    return loss_fn(model, x, y) * made.weight


class Smoothed(nn.Module):
    """A loss that is a module, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.entropy = nn.Dropout(0.5), nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, model: nn.Module, x: Any, y: Any) -> Any:
        """The loss."""
        return self.entropy(self.drop(model(x).float()), y)


def by_mode() -> tuple[Callable[..., Any], Callable[[], None]]:
    made = Smoothed()
    return made, lambda: made.train(False) and None


def by_part() -> tuple[Callable[..., Any], Callable[[], None]]:
    made = Smoothed()
    return made, lambda: setattr(made.entropy, "label_smoothing", 0.5)


def by_converted_teacher() -> tuple[Callable[..., Any], Callable[[], None]]:
    teacher: Any = mpgraph.convert(Net(), "bf16", policy="autocast-cpu")

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return F.mse_loss(model(x).float(), teacher(x).float().detach())

    return loss, lambda: teacher.train(False) and None


def by_teacher() -> tuple[Callable[..., Any], Callable[[], None]]:
    teacher = Net()  # with the names of the model's own parameters

    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return F.mse_loss(model(x).float(), teacher(x).detach())

    return loss, lambda: teacher.train(False) and None


@pytest.mark.parametrize(
    "make",
    [
        by_global, by_closure, by_dict, by_default, by_tensor, by_object, by_method, by_partial,
        by_mode, by_part, by_teacher, by_converted_teacher,
    ],
)  # fmt: skip
def test_what_a_loss_function_reads_may_change(make: Any) -> None:
    torch.manual_seed(3)
    loss, change = make()
    twins = Twins(loss)
    twins.take()
    change()
    twins.take()


def test_what_a_loss_function_does_not_read_may_change_without_a_capture() -> None:
    made = Weighted()
    twins = Twins(made.method)
    twins.take()
    captured = len(twins.step._captures.gradients)
    for _ in range(2):
        made.calls += 1
        twins.take(1)
    assert len(twins.step._captures.gradients) == captured


def test_functions_of_libraries_are_not_looked_into() -> None:
    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return loss_fn(model, torch.from_numpy(np.stack(list(map(copy.deepcopy, x)))), y)

    reads = LossReads(loss, nn.Linear(1, 1))
    assert {function.__name__ for function in reads._functions} == {"loss", "loss_fn"}


# What a loss function must not do

history: list[Any] = []


def draws_python(model: nn.Module, x: Any, y: Any) -> Any:
    return loss_fn(model, x, y) * random.random()


def draws_numpy(model: nn.Module, x: Any, y: Any) -> Any:
    return loss_fn(model, x, y) * float(np.random.rand())


def seeds(model: nn.Module, x: Any, y: Any) -> Any:
    torch.manual_seed(0)
    return loss_fn(model, x, y)


def appends(model: nn.Module, x: Any, y: Any) -> Any:
    loss = loss_fn(model, x, y)
    history.append(loss.detach())
    return loss


def prints(model: nn.Module, x: Any, y: Any) -> Any:
    loss = loss_fn(model, x, y)
    print(loss)
    return loss


def formats(model: nn.Module, x: Any, y: Any) -> Any:
    loss = loss_fn(model, x, y)
    f"{loss:.3f}"
    return loss


def goes_to_numpy(model: nn.Module, x: Any, y: Any) -> Any:
    loss = loss_fn(model, x, y)
    return loss * float(loss.detach().numpy())


def branches(model: nn.Module, x: Any, y: Any) -> Any:
    loss = loss_fn(model, x, y)
    return loss * 2 if loss > 1 else loss


def aligns(model: nn.Module, x: Any, y: Any) -> Any:
    scores = model(x).float().log_softmax(-1).unsqueeze(1)
    return F.ctc_loss(scores, y[:1].unsqueeze(0), torch.tensor([len(y)]), torch.tensor([1]))


def goes_backward(model: nn.Module, x: Any, y: Any) -> Any:
    loss = loss_fn(model, x, y)
    loss.backward(retain_graph=True)
    return loss


def checkpoints(model: nn.Module, x: Any, y: Any) -> Any:
    return F.cross_entropy(checkpoint(model, x, use_reentrant=False).float(), y)


REFUSED = (
    (draws_python, "it draws numbers from Python's random module"),
    (draws_numpy, r"it draws numbers from numpy\.random"),
    (seeds, "it seeds or sets torch's random numbers"),
    (appends, "it changes history"),
    (prints, "needs the value of a tensor at .*print"),
    (formats, 'needs the value of a tensor at .*f"'),
    (goes_to_numpy, "needs the value of a tensor at .*numpy"),
    (branches, "needs the value of a tensor at .*if loss > 1"),
    (aligns, r"the size of what aten\._ctc_loss.* returns at .*F\.ctc_loss"),
    (goes_backward, "a backward pass inside the loss function leaves no trace"),
    (checkpoints, "a checkpoint, whose memory a graph would not save"),
)


@pytest.mark.parametrize(("loss", "reason"), REFUSED)
def test_what_happens_once_and_not_at_every_step_is_refused(loss: Any, reason: str) -> None:
    twins = Twins(loss)
    history.clear()
    before = copy.deepcopy(twins.step.model.state_dict()), random.getstate()
    for _ in range(2):
        with pytest.raises(CaptureError, match=reason):
            twins.step(*batch(0))
    assert not history
    assert random.getstate() == before[1]
    assert all(p.grad is None for p in twins.step.model.parameters())
    for name, value in twins.step.model.state_dict().items():
        assert torch.equal(value, before[0][name])


@pytest.fixture
def handles_to_remove() -> Iterator[list[Any]]:
    handles: list[Any] = []
    yield handles
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["optimizer", "every optimizer", "parameter"])
def test_hooks_that_come_later_are_refused_too(kind: str, handles_to_remove: list[Any]) -> None:
    twins = Twins()
    twins.take()
    register, reason = {
        "optimizer": (twins.optimizers[0].register_step_post_hook, "the optimizer has step hooks"),
        "every optimizer": (register_optimizer_step_post_hook, "on the steps of every optimizer"),
        "parameter": (
            twins.step.model.first.weight.register_post_accumulate_grad_hook,  # type: ignore[union-attr]
            r"first\.weight has a post-accumulate-grad hook",
        ),
    }[kind]
    handles_to_remove.append(register(lambda *_: None))
    with pytest.raises(CaptureError, match=reason):
        twins.step(*batch(0))


def test_gradients_that_would_get_lost_in_the_batch_are_refused() -> None:
    twins = Twins(lambda model, x, y, w: loss_fn(model, x, y) + w.pow(2).sum())
    weight: Any = twins.step.model.first.weight  # type: ignore[union-attr]
    with pytest.raises(CaptureError, match=r"the batch holds parameter first\.weight"):
        twins.step(*batch(0), weight)
    with pytest.raises(CaptureError, match=r"computed from others .*\(MulBackward0\)"):
        twins.step(*batch(0), weight * 2)
    with pytest.warns(UserWarning, match=r"so its \.grad stays as it is"):
        twins.step(*batch(0), torch.ones(2, requires_grad=True))


def test_sparse_gradients_are_refused() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 3, sparse=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x)

    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    twins = Twins(model=Sparse, make=sgd)
    with pytest.raises(CaptureError, match=r"the gradient of table\.weight is sparse"):
        twins.step(torch.arange(5), batch(0)[1])


# Windows of several batches


class Branched(Net):
    """Has a layer that runs only where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, use: bool = False) -> torch.Tensor:
        """Scores."""
        return super().forward(self.spare(x) if use else x)


def branched(model: nn.Module, x: torch.Tensor, y: torch.Tensor, use: bool) -> torch.Tensor:
    return F.cross_entropy(model(x, use).float(), y)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_parameter_that_only_some_batches_of_a_window_use(precision: str) -> None:
    torch.manual_seed(0)
    first = Branched()
    second = copy.deepcopy(first)
    optimizers: Any = adamw(first.parameters()), adamw(second.parameters())
    step = mpgraph.TrainStep(
        first, optimizers[0], branched, precision=precision, policy="autocast-cpu", compile=False,
        accumulation_steps=2,
    )  # fmt: skip
    loop = mpgraph.convert(second, precision, policy="autocast-cpu")
    if precision == "fp16":
        mpgraph.guard(optimizers[1], loop)
    uses = [False, False, True, False, False, True, True, True, False, False]
    for index, use in enumerate(uses):
        torch.manual_seed(index)
        step(*batch(index), use)
        torch.manual_seed(index)
        (branched(loop, *batch(index), use) / 2).backward()
        if index % 2:
            optimizers[1].step()
            loop.zero_grad()
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            assert_same(p, q)


def test_a_parameter_that_is_frozen_within_a_window_is_refused() -> None:
    model = Net()
    step = mpgraph.TrainStep(
        model, adamw(model.parameters()), loss_fn, precision="bf16", compile=False,
        accumulation_steps=2,
    )  # fmt: skip
    step(*batch(0))
    step.model.first.weight.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(CaptureError, match=r"gradients of first\.weight have been added up"):
        step(*batch(1))


# What is around the call


def test_no_grad_and_autocast_around_a_step_change_nothing() -> None:
    twins = Twins(precision="fp16")
    step = twins.step

    def inside(*given: Any) -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return step(*given)

    twins.step = inside  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"a torch\.autocast region around a TrainStep"):
        twins.take(3)


def test_inference_mode_around_a_step_is_refused() -> None:
    twins = Twins()
    with torch.inference_mode(), pytest.raises(CaptureError, match="inference_mode"):
        twins.step(*batch(0))


def penalty_of_inputs(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    scores = model(x).float()
    (g,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return F.cross_entropy(scores, y) + (g.norm(dim=1) - 1).pow(2).mean()


def penalty_of_weights(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = loss_fn(model, x, y)
    gradients = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
    return loss + sum(g.pow(2).sum() for g in gradients)  # type: ignore[return-value]


@pytest.mark.parametrize("loss", [penalty_of_inputs, penalty_of_weights])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_of_gradients(loss: Any, precision: str) -> None:
    Twins(loss, precision).take(4)


# Weird batches, and copies of a step


def by_kind(model: nn.Module, given: Any, flag: Any = None, name: str = "x") -> torch.Tensor:
    loss = loss_fn(model, given["x"], given["y"]) * (flag or 1)
    return loss * 2 if name == "y" else loss


def test_batches_of_many_kinds() -> None:
    kinds = [(None, "x"), (2, "x"), (3, "x"), (0.5, "y"), (True, "x"), (None, "x")]

    def given(index: int) -> tuple[Any, ...]:
        x, y = batch(index)
        flag, name = kinds[index % len(kinds)]
        return {"x": x if index % 2 else x.t().contiguous().t(), "y": y}, flag, name

    Twins(by_kind).take(12, given)


def test_an_empty_batch() -> None:
    def loss(model: nn.Module, x: Any, y: Any) -> Any:
        return F.cross_entropy(model(x).float(), y, reduction="sum")

    twins = Twins(loss)
    twins.take()
    twins.take(2, lambda _: (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)))


def test_a_batch_that_fails_leaves_the_step_as_it_was() -> None:
    twins = Twins()
    twins.take()
    with pytest.raises(IndexError, match="Target 99 is out of bounds"):
        twins.step(batch(0)[0], torch.full((5,), 99))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        twins.step(torch.randn(5, 7), batch(0)[1])
    twins.take()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_copy_of_a_step_goes_on_by_itself(copied: Any, precision: str) -> None:
    twins = Twins(precision=precision)
    twins.take(3)
    other = copied(twins.step)
    before = copy.deepcopy(twins.step.model.state_dict())
    torch.manual_seed(9)
    loss = other(*batch(9))
    for name, value in twins.step.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert_same(
        state_of(other.model).scale.value.scale, state_of(twins.step.model).scale.value.scale
    )
    torch.manual_seed(9)
    assert_same(loss, twins.step(*batch(9)))
    pairs = zip(other.model.parameters(), twins.step.model.parameters(), strict=True)
    assert all(torch.equal(p, q) and p is not q for p, q in pairs)


def test_two_steps_share_a_model() -> None:
    def negative(model: nn.Module, x: Any, y: Any) -> Any:
        return -loss_fn(model, x, y)

    torch.manual_seed(0)
    first = Net()
    models: Any = [mpgraph.convert(m, "fp16") for m in (first, copy.deepcopy(first))]
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=False)
    optimizers = [(sgd(m.first.parameters()), sgd(m.last.parameters())) for m in models]
    losses = (loss_fn, negative)
    steps = [
        mpgraph.TrainStep(models[0], optimizer, loss, compile=False)
        for optimizer, loss in zip(optimizers[0], losses, strict=True)
    ]
    for optimizer in optimizers[1]:
        mpgraph.guard(optimizer, models[1])
    for index in range(5):
        torch.manual_seed(index)
        for step in steps:
            step(*batch(index))
        torch.manual_seed(index)
        for optimizer, loss in zip(optimizers[1], losses, strict=True):
            loss(models[1], *batch(index)).backward()
            optimizer.step()
            models[1].zero_grad()
        pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


def test_many_kinds_of_batch_are_said() -> None:
    torch.manual_seed(0)
    model = mpgraph.convert(nn.Linear(4, 2), "bf16", max_graphs=4)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mpgraph.TrainStep(model, sgd, lambda m, x, w: m(x).float().mean() * w, compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weight in (1.0, 2.0):
            step(torch.ones(2, 4), weight)
    with pytest.warns(UserWarning, match="has been captured 2 times"):
        step(torch.ones(2, 4), 3.0)


def test_a_number_in_what_the_loss_function_returns_is_refused():
    def loss_fn(model, x):
        loss = model(x).float().square().mean()
        return loss, loss.item()

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mpgraph.TrainStep(model, optimizer, loss_fn, precision="bf16", compile=False)
    with pytest.raises(mpgraph.CaptureError, match="needs the value of a tensor"):
        step(torch.ones(1, 2))


def test_a_policy_for_a_model_that_has_one_is_refused():
    model = mpgraph.convert(nn.Linear(2, 2), "bf16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(mpgraph.PolicyError, match="is converted already"):
        mpgraph.TrainStep(model, optimizer, lambda model, x: model(x).mean(), policy="lean")


def test_a_model_that_was_compiled_in_place_is_captured_as_it_is():
    model = mpgraph.convert(nn.Linear(2, 2), "bf16")
    model.compile(backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = mpgraph.TrainStep(model, optimizer, lambda m, x: m(x).float().mean(), compile=False)
    assert step(torch.ones(1, 2)) > step(torch.ones(1, 2))
