"""A graph no longer holds when the user changes what forward reads in Python."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpgraph
from mpgraph.module import state_of


class Switched(nn.Module):
    """Reads Python state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.phase = 0
        self.skip: list[int] = []
        self.config = types.SimpleNamespace(gain=1.0, inner=types.SimpleNamespace(negate=False))
        self.activation: Callable[[Tensor], Tensor] = torch.relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.drop(self.layer(x))) * self.config.gain
        if self.phase == 1:
            y = y + 1
        if 0 in self.skip:
            y = x
        if getattr(self, "late", False):
            y = y * 3
        return -y if self.config.inner.negate else y


def set_phase(model: Any) -> None:
    model.phase = 1


def set_dropout(model: Any) -> None:
    model.drop.p = 0.1


def set_list(model: Any) -> None:
    model.skip.append(0)


def set_config(model: Any) -> None:
    model.config.gain = 2.0


def set_inner_config(model: Any) -> None:
    model.config.inner.negate = True


def set_new_attribute(model: Any) -> None:
    model.late = True


def set_function(model: Any) -> None:
    model.activation = torch.tanh


def set_hook(model: Any) -> None:
    model.layer.register_forward_hook(lambda module, args, output: output * 5)


def set_forward(model: Any) -> None:
    layer = model.layer
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias) + 7


def replace_config(model: Any) -> None:
    model.config = types.SimpleNamespace(gain=2.0, inner=types.SimpleNamespace(negate=False))


def replace_inner_config(model: Any) -> None:
    model.config.inner = types.SimpleNamespace(negate=True)


CHANGES = [
    set_phase, set_dropout, set_list, set_config, set_inner_config, replace_config,
    replace_inner_config, set_new_attribute,
    set_function, set_hook, set_forward,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_python_state_is_seen_by_the_next_call(change: Callable[[Any], None]):
    model = Switched()
    converted = mpgraph.convert(copy.deepcopy(model), "bf16", policy="autocast-cpu")
    x = torch.randn(4, 8)
    for subject in (model, converted):
        subject(x)
        change(subject)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
    torch.manual_seed(1)
    assert torch.equal(converted(x), want)


class Doubles:
    def __call__(self, x: Tensor) -> Tensor:
        return x * 2


class Halves:
    def __call__(self, x: Tensor) -> Tensor:
        return x * 0.5


class Strategic(nn.Linear):
    """Runs what it holds."""

    def __init__(self, strategy: Callable[[Tensor], Tensor]) -> None:
        super().__init__(8, 8)
        self.strategy = strategy

    def forward(self, x: Tensor) -> Tensor:
        return self.strategy(super().forward(x))


def scaled(x: Tensor, factor: Any) -> Tensor:
    return x / 2 if factor is True else x * factor


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Doubles(), Halves()),
        (functools.partial(scaled, factor=2), functools.partial(scaled, factor=0.5)),
        (functools.partial(scaled, factor=1), functools.partial(scaled, factor=True)),
    ],
)
def test_another_strategy_is_seen_by_the_next_call(first: Any, second: Any):
    model = mpgraph.convert(Strategic(first), "bf16")
    x = torch.ones(2, 8)
    once = model(x)
    model.strategy = second
    assert torch.equal(model(x), second(once / first(torch.ones(()))))


class Counted(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.times: Any = 1

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return -y if self.times is True else y * 2 if isinstance(self.times, (list, dict)) else y


@pytest.mark.parametrize(
    ("kinds", "factors"), [((1, True), (1, -1)), (([1], {1: 1}, 1), (2, 2, 1))]
)
def test_equal_values_of_other_types_are_told_apart(kinds: Any, factors: Any):
    model = mpgraph.convert(Counted(), "bf16")
    x = torch.ones(2, 8)
    once = model(x)
    for kind, factor in zip(kinds, factors, strict=True):
        model.times = kind
        assert torch.equal(model(x), once * factor)


class Named(nn.Linear):
    """Has a list only later, as a model's config has the names of its classes once it is saved."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.names: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * len(self.names or ())


@pytest.mark.parametrize("kind", [list, tuple, set, dict.fromkeys])
def test_what_was_none_may_become_a_container_and_change(kind: Callable[[Any], Any]):
    model = mpgraph.convert(Named(), "bf16")
    x = torch.ones(2, 8)
    assert not model(x).any()
    model.names = kind(["a"])
    once = model(x)
    model.names = kind(["a", "b"])
    assert once.any()
    assert torch.equal(model(x), once * 2)
    if isinstance(model.names, list):
        model.names.append("c")
        assert torch.equal(model(x), once * 3)


def test_going_back_finds_the_earlier_graph():
    converted = mpgraph.convert(Switched(), "bf16")
    x = torch.randn(4, 8)
    for phase in (0, 1, 0, 1):
        converted.phase = phase
        converted(x)
    assert len(state_of(converted).specialisations()) == 2


def test_attributes_that_forward_never_changes_cost_one_graph():
    converted = mpgraph.convert(Switched(), "bf16")
    for size in (4, 5, 6):
        converted(torch.randn(size, 8))
    assert len(state_of(converted).specialisations()) == 1


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:mpgraph")
def test_a_counter_that_forward_keeps_does_not_make_a_graph_per_call():
    converted = mpgraph.convert(Counts(), "bf16", max_graphs=4)
    for _ in range(8):
        converted(torch.randn(2, 4))
    assert converted.calls == 8
    assert len(state_of(converted).specialisations()) == 1


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layer(x)
        return self.last * 2


def test_a_tensor_that_forward_leaves_on_a_module_does_not_make_another_graph():
    converted = mpgraph.convert(Keeps(), "bf16")
    for _ in range(3):
        out = converted(torch.randn(2, 4))
        assert torch.equal(converted.last * 2, out)
    assert len(state_of(converted).specialisations()) == 1


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.settings = {"gain": 1.0}
        self.terms = [torch.ones(8)]
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = x @ self.weight * self.settings["gain"] + sum(self.terms)
        if hasattr(self, "adapter"):
            y = y + self.adapter(x)
        if hasattr(self, "extra"):
            y = y + self.extra
        if self.shift is not None:
            y = y + self.shift
        if other is x:
            y = y * 2
        if x.requires_grad or self.weight.requires_grad is False:
            y = y * 3
        return y if x.is_contiguous() else -y


def add_child(model: Any) -> None:
    model.add_module("adapter", nn.Linear(8, 8))
    nn.init.ones_(model.adapter.weight)
    nn.init.ones_(model.adapter.bias)


def add_parameter(model: Any) -> None:
    model.register_parameter("extra", nn.Parameter(torch.full((8,), 3.0)))


def set_dictionary(model: Any) -> None:
    model.settings["gain"] = 5.0


def set_listed_tensor(model: Any) -> None:
    model.terms[0] = torch.full((8,), 4.0)


def add_listed_tensor(model: Any) -> None:
    model.terms.append(torch.full((8,), 4.0))


def drop_buffer(model: Any) -> None:
    model.shift = None


def freeze(model: Any) -> None:
    model.weight.requires_grad_(False)


STRUCTURE = [
    add_child, add_parameter, set_dictionary, set_listed_tensor, add_listed_tensor, drop_buffer,
    freeze,
]  # fmt: skip


@pytest.mark.parametrize("change", STRUCTURE)
def test_a_change_of_structure_is_seen_by_the_next_call(change: Callable[[Any], None]):
    model = Grows()
    converted = mpgraph.convert(copy.deepcopy(model), "bf16", policy="autocast-cpu")
    x = torch.randn(4, 8)
    for subject in (model, converted):
        subject(x)
        change(subject)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
    got = converted(x)
    assert torch.equal(got, want)
    if got.requires_grad:
        got.sum().backward()
        assert all(p.grad is not None for p in converted.parameters())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mean", torch.ones(8))
        self.register_buffer("shift", self.mean)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens) * self.mean) + self.shift


def untie_weights(model: Any) -> None:
    model.head.weight = nn.Parameter(torch.ones(8, 8))


def untie_buffers(model: Any) -> None:
    model.shift = torch.zeros(8)


@pytest.mark.parametrize("untie", [untie_weights, untie_buffers])
def test_what_is_tied_at_first_and_then_no_more_is_read_from_two_places(untie):
    model, tokens = Tied(), torch.arange(8)
    converted = mpgraph.convert(copy.deepcopy(model), "bf16", policy="autocast-cpu")
    converted(tokens)
    for subject in (model, converted):
        untie(subject)
    with torch.autocast("cpu", torch.bfloat16):
        want = model(tokens)
    got = converted(tokens)
    assert torch.equal(got, want)
    got.sum().backward()
    want.sum().backward()
    for parameter, other in zip(converted.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


class TakesWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((8,), 2.0))

    def forward(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return nn.functional.linear(x, weight) * scale + self.a(x) * self.scale


def test_an_argument_that_is_the_models_own_tensor_does_not_stand_for_it_afterwards():
    model, x = TakesWeights(), torch.randn(4, 8)
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu", capture="export")
    old = model.a.weight

    def gradients(subject: nn.Module, weight: Tensor, scale: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=subject is model):
            result = subject(x, weight, scale)
        given = [*model.parameters(), weight]
        found = torch.autograd.grad(result.float().square().sum(), given, allow_unused=True)
        return [result, *(torch.zeros(()) if g is None else g for g in found)]

    def check(weight: Tensor, scale: Tensor) -> None:
        pairs = zip(
            gradients(converted, weight, scale), gradients(model, weight, scale), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)

    check(old, torch.ones(8))
    check(model.b.weight, torch.ones(8))
    check(old, model.scale)
    check(model.b.weight, torch.full((8,), 3.0))
    for subject in (model, converted):
        subject.a.weight = nn.Parameter(torch.ones(8, 8)) if subject is model else model.a.weight
    check(old, torch.ones(8))
    check(model.a.weight, torch.ones(8))


def test_properties_of_arguments_that_forward_may_ask_for_are_told_apart():
    model = Grows()
    converted = mpgraph.convert(copy.deepcopy(model), "bf16", policy="autocast-cpu")
    x = torch.randn(8, 8)
    calls = [
        (x,), (x, x), (x, x.clone()), (x.t(),), (x.clone().requires_grad_() * 1,),
    ]  # fmt: skip
    for arguments in calls:
        with torch.autocast("cpu", torch.bfloat16):
            want = model(*arguments)
        assert torch.equal(converted(*arguments), want)


class Propagates(nn.Module):
    """A layer of a graph network; sparse products exist in float32 only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        with torch.autocast("cpu", enabled=False):
            if adjacency.layout is torch.strided:
                return adjacency @ hidden.float() + 1
            return torch.sparse.mm(adjacency, hidden.float())


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_and_dense_arguments_are_told_apart():
    model, x = Propagates(), torch.randn(4, 8)
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu")
    for make in (Tensor.to_sparse_csr, Tensor.to_sparse_coo, Tensor.clone):
        adjacency = make(torch.eye(4) * 3)
        with torch.autocast("cpu", torch.bfloat16):
            want = model(adjacency, x)
        assert torch.equal(converted(adjacency, x), want)


def test_a_shallow_copy_does_not_run_the_originals_weights():
    converted = mpgraph.convert(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), "bf16")
    x = torch.randn(4, 8)
    before = converted(x)
    other = copy.copy(converted)
    other._modules = {**converted._modules, "0": nn.Linear(8, 8)}
    assert not torch.equal(other(x), before)
    assert torch.equal(converted(x), before)


def test_a_generator_made_in_forward_starts_anew_at_every_call():
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.rand(8, generator=torch.Generator().manual_seed(3))

    converted = mpgraph.convert(Draws(), "bf16")
    x = torch.randn(4, 8)
    with pytest.warns(UserWarning, match="random generator"):
        first = converted(x)
    assert torch.equal(converted(x), first)


def test_lazy_parameters_are_refused():
    with pytest.raises(mpgraph.PrecisionError, match="not initialised yet"):
        mpgraph.convert(nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4)), "bf16")


def test_an_equal_object_in_the_place_of_another_costs_no_graph():
    converted = mpgraph.convert(Switched(), "bf16")
    x = torch.randn(4, 8)
    for _ in range(4):
        converted(x)
        converted.config = copy.deepcopy(converted.config)
    assert len(mpgraph.explain(converted).graphs) == 1
