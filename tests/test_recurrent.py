"""Recurrent layers in a TrainStep: whole, in every precision, and as in the loop it replaces."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import mpgraph
from mpgraph import recurrent, recurrent_ops
from mpgraph.recurrent_ops import Options

WIDTH, HIDDEN, BATCH, LENGTH = 6, 4, 3, 5
DEEP = {"num_layers": 2, "bidirectional": True, "dropout": 0.3, "batch_first": True}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm-deep": (nn.LSTM, DEEP),
    "lstm-without-bias": (nn.LSTM, {"bias": False}),
    "lstm-projected": (nn.LSTM, {"proj_size": 3, "batch_first": True}),
    "gru": (nn.GRU, {"batch_first": True}),
    "gru-deep": (nn.GRU, DEEP),
    "rnn-tanh": (nn.RNN, {"bidirectional": True}),
    "rnn-relu": (nn.RNN, {"num_layers": 2, "nonlinearity": "relu"}),
}


class Net(nn.Module):
    """A layer, a recurrent one, and a layer on its results and states."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        make, options = KINDS[kind]
        self.inner, self.rnn = nn.Linear(WIDTH, WIDTH), make(WIDTH, HIDDEN, **options)
        width = options.get("proj_size", HIDDEN) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A loss."""
        y, states = self.rnn(self.inner(x).relu())
        states = states if isinstance(states, tuple) else (states,)
        total = self.head(y.relu()).float().square().mean()
        return total + sum(state.float().mean() for state in states)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Without kernels that compute in another order."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=False)


def own_loss(model: nn.Module, *batch: Any) -> Any:
    """What the model returns."""
    return model(*batch)


class Twins:
    """A step, and the loop that it replaces, from the same weights."""

    def __init__(
        self,
        model: nn.Module,
        precision: str,
        loss_fn: Callable[..., Any] = own_loss,
        compile: bool = False,
    ) -> None:
        self.loop = mpgraph.convert(copy.deepcopy(model), precision)
        self.model, self.loss_fn = model, loss_fn
        self.optimizer = sgd(self.loop.parameters())
        if precision == "fp16":
            mpgraph.guard(self.optimizer, self.loop)
        self.step = mpgraph.TrainStep(
            model, sgd(model.parameters()), loss_fn, precision=precision, compile=compile
        )

    def take(self, index: int, *batch: Any) -> None:
        """One step of both."""
        torch.manual_seed(index)
        got = self.step(*batch)
        torch.manual_seed(index)
        loss = self.loss_fn(self.loop, *batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses = got, loss.detach()

    def hold(self, tolerance: float = 0.0) -> None:
        """Loss and parameters are equal."""
        pairs = zip(self.model.parameters(), self.loop.parameters(), strict=True)
        for got, want in (self.losses, *pairs):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    def operators(self) -> list[str]:
        """What the step runs."""
        return [node.operator for node in self.step.explain().nodes]


def _batch(length: int = LENGTH, batch: int = BATCH) -> torch.Tensor:
    return torch.randn(batch, length, WIDTH)


PRECISIONS = ("fp32", "bf16", "fp16")
QUICK = {
    *itertools.product(("lstm-deep", "gru-deep"), PRECISIONS),
    *(("lstm", "fp32"), ("rnn-relu", "bf16")),
}
QUICK_COMPILED = {("lstm-deep", "fp32"), ("gru", "fp16")}


def _cases(quick: set[tuple[str, str]]) -> list[Any]:
    return [
        pytest.param(*case, marks=[] if case in quick else [pytest.mark.slow])
        for case in itertools.product(KINDS, PRECISIONS)
    ]


@pytest.mark.parametrize(("kind", "precision"), _cases(QUICK))
def test_a_step_is_the_loop_bit_for_bit(kind: str, precision: str) -> None:
    """In fp32, the LSTM is that of oneDNN; dropout between layers draws the same numbers."""
    torch.manual_seed(0)
    twins = Twins(Net(kind), precision)
    for index in range(3):
        twins.take(index, _batch())
        twins.hold()
    assert sum("recurrent_backward" in name for name in twins.operators()) == 1


@pytest.mark.parametrize(("kind", "precision"), _cases(QUICK_COMPILED))
def test_a_compiled_step_is_the_loop(kind: str, precision: str) -> None:
    """But for roundings around the layer, which Inductor may leave out."""
    torch.manual_seed(0)
    with torch._inductor.config.patch(fallback_random=True):
        twins = Twins(Net(kind), precision, compile=True)
        for index in range(3):
            twins.take(index, _batch())
    twins.hold({"fp32": 1e-6, "bf16": 1e-2, "fp16": 1e-3}[precision])


def test_a_graph_does_not_grow_with_the_length_of_a_sequence() -> None:
    counts = []
    for length in (3, 300):
        twins = Twins(Net("gru"), "bf16")
        for index in range(2):
            twins.take(index, _batch(length))
            twins.hold()
        counts.append(len(twins.operators()))
    assert counts[0] == counts[1]


class Packed(nn.Module):
    """Takes a packed sequence."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.rnn = make(WIDTH, HIDDEN, num_layers=2)

    def forward(self, data: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """A loss."""
        y, _ = self.rnn(PackedSequence(data, sizes))
        return y.data.float().square().mean()


def _packed(lengths: Sequence[int]) -> PackedSequence:
    return pack_padded_sequence(
        _batch(max(lengths), len(lengths)), torch.tensor(lengths), batch_first=True
    )


def test_a_packed_sequence_is_refused() -> None:
    sequence = _packed([5, 3, 2])
    twins = Twins(Packed(nn.GRU), "fp32")
    with pytest.raises(mpgraph.CaptureError, match=r"of a tensor's value.*mpgraph\.guard"):
        twins.step(sequence.data, sequence.batch_sizes)


class Twice(nn.Module):
    """One layer, called on the same values twice, with dropout in it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH, num_layers=2, dropout=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """How far two draws are from each other."""
        first, second = self.rnn(x)[0], self.rnn(x)[0]
        return (first - second).float().square().mean()


def test_calls_that_look_alike_are_not_merged() -> None:
    with torch._inductor.config.patch(fallback_random=True):
        twins = Twins(Twice(), "fp32", compile=True)
        for index in range(2):
            twins.take(index, _batch())
    assert twins.losses[0] > 1e-4
    twins.hold(1e-6)


class Written(nn.Module):
    """Writes over what the layer took, and what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.rnn = nn.Linear(WIDTH, WIDTH), nn.LSTM(WIDTH, HIDDEN)

    def forward(self, x: torch.Tensor, keep: bool) -> torch.Tensor:
        """A loss."""
        h = self.inner(x)
        y = self.rnn(h.clone() if keep else h)[0]
        y = y.clone() if keep else y
        h.mul_(0.5)
        y.mul_(2.0)
        return h.square().mean() + y.square().mean()


def test_what_a_layer_has_kept_is_not_written_over() -> None:
    """Autograd refuses such a loop; what a step's layer keeps is its own, as if it got clones."""
    x, losses = _batch(), []
    for keep in (True, False):
        torch.manual_seed(1)
        model = Written()
        step = mpgraph.TrainStep(
            model, sgd(model.parameters()), own_loss, precision="fp32", compile=False
        )
        losses.append(torch.stack([step(x, keep) for _ in range(3)]))
    assert torch.equal(*losses)


def _penalised(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    loss = model(x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + gradient.square().sum()


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_penalty_on_the_gradient_unrolls_the_layer(kind: str) -> None:
    twins = Twins(Net(kind), "fp32", _penalised)
    for index in range(2):
        twins.take(index, _batch())
    twins.hold(1e-6)
    assert not any("recurrent" in name for name in twins.operators())


def _adversarial(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    loss = model(x)
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    return loss + model(x.detach() + 0.1 * gradient.sign())


def test_a_loss_may_be_differentiated_more_than_once() -> None:
    twins = Twins(Net("lstm"), "fp32", _adversarial)
    for index in range(2):
        twins.take(index, _batch())
    twins.hold(1e-6)
    assert sum("recurrent_backward" in name for name in twins.operators()) == 3


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_was_recorded_goes_when_the_step_is_over(compile: bool) -> None:
    twins = Twins(Net("lstm"), "fp32", compile=compile)
    twins.take(0, _batch())
    gc.collect()
    assert not any(type(held) is recurrent_ops._Record for held in gc.get_objects())


def test_a_layer_of_the_loss_function_is_kept_whole_too() -> None:
    judge = nn.LSTM(1, HIDDEN)

    def judged(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return judge(model(x).reshape(1, 1, 1))[0].square().sum()

    twins = Twins(Net("gru"), "fp32", judged)
    for index in range(2):
        twins.take(index, _batch())
        twins.hold()
    assert sum("recurrent_backward" in name for name in twins.operators()) == 2


CALLS = [
    (Options(biases, layers, 0.0, True, both, first), projected)
    for biases, layers, both, first, projected in itertools.product(
        (True, False), (1, 2), (False, True), (False, True), (False, True)
    )
]


def _tensors(name: str, options: Options, projected: bool) -> list[torch.Tensor]:
    kind: Any = {"lstm": nn.LSTM, "gru": nn.GRU}.get(name, nn.RNN)
    layers, both = options.num_layers, options.bidirectional
    more = {"bias": options.has_biases, "bidirectional": both}
    more |= {"proj_size": 3} if projected else {}
    module = kind(WIDTH, HIDDEN, layers, **more)
    count, width = layers * (1 + both), 3 if projected else HIDDEN
    states = [torch.randn(count, BATCH, width), torch.randn(count, BATCH, HIDDEN)]
    data = _batch() if options.batch_first else _batch().transpose(0, 1)
    found = [data, *states[: recurrent_ops.count_states(name)], *module.parameters()]
    return [tensor.requires_grad_() for tensor in found]


@pytest.mark.parametrize("name", recurrent_ops.NAMES)
def test_fake_results_and_gradients_are_like_real_ones(name: str) -> None:
    """In shape, strides and dtype, which compiled code relies on."""
    for options, projected in CALLS if name == "lstm" else CALLS[::2]:
        real, mode, seen = _tensors(name, options, projected), FakeTensorMode(), []
        for tensors in (real, [mode.from_tensor(tensor) for tensor in real]):
            outputs = recurrent.Layers(name, tensors, options).whole()
            gradients = torch.autograd.grad(sum(o.sum() for o in outputs), tensors)
            seen.append([_kind(value) for value in (*outputs, *gradients)])
        assert seen[0] == seen[1]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", recurrent_ops.NAMES)
def test_a_capture_sees_what_it_would_see_unrolled(name: str, autocast: bool) -> None:
    target = recurrent_ops.OVERLOADS[name]
    for options, projected in (CALLS if name == "lstm" else CALLS[::2])[::3]:
        mode = FakeTensorMode()
        real = _tensors(name, options, projected)
        tensors = [mode.from_tensor(tensor) for tensor in real]
        arguments = recurrent_ops.arguments(name, tensors, options)
        with mode, torch.autocast("cpu", enabled=autocast), enable_python_dispatcher():
            with recurrent.unrolled_in_shape():  # torch 2.11's LSTM has a dimension too many
                want = target(*arguments)
            with recurrent.looked_at:
                got = target(*arguments)
        assert [_kind(value) for value in got] == [_kind(value) for value in want]


def _kind(value: torch.Tensor) -> tuple[Any, ...]:
    return value.shape, value.stride(), value.dtype, value.requires_grad
