"""Whatever forward reads through a module's attributes is part of the graph, however deep."""

from __future__ import annotations

import array
import collections
import copy
import dataclasses
import functools
import itertools
import pathlib
import random
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import mpgraph
from mpgraph.capture.attribute_reads import attribute_reads
from mpgraph.module import state_of


@dataclasses.dataclass
class Gain:
    gain: Any = 1.0


@dataclasses.dataclass
class Outer:
    inner: Any


class Slotted:
    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 1.0


class Computed:
    def __init__(self) -> None:
        self._gain = 1.0

    @property
    def gain(self) -> float:
        return self._gain


class Looked:
    """Keeps its attributes in a dict, as configuration libraries do."""

    def __init__(self) -> None:
        self.__dict__["_content"] = {"gain": 1.0}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_content"][name]
        except KeyError:
            raise AttributeError(name) from None


class Remapped:
    """As a Hugging Face config: the attribute that is asked for is not the one that is read."""

    def __init__(self) -> None:
        self.factor = 1.0

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__("factor" if name == "gain" else name)


class Strategy:
    def __init__(self, gain: float) -> None:
        self.config = types.SimpleNamespace(inner=Gain(gain))

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.config.inner.gain


class Mapping(dict[str, Any]):
    pass


Point = collections.namedtuple("Point", ["gain"])


def enclosing(held: dict[str, float]) -> Callable[[Tensor], Tensor]:
    return lambda x: x * held["gain"]


def times_first(factors: list[float], x: Tensor) -> Tensor:
    return x * factors[0]


def full(value: float) -> Tensor:
    return torch.full((8,), value)


REFERRED_TO = Gain()
Case = tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], Callable[[Any], Any]]
# What hangs on the module as `held`; how forward uses it; what is then done to the module.
CASES: dict[str, Case] = {
    "a tensor in a dict": (
        lambda: {"w": full(1)},
        lambda m, x: x * m.held["w"],
        lambda m: m.held.update(w=full(3)),
    ),
    "a tensor in an object": (
        lambda: Gain(full(1)),
        lambda m, x: x * m.held.gain,
        lambda m: setattr(m.held, "gain", full(3)),
    ),
    "a list in a list": (
        lambda: [[1.0]],
        lambda m, x: x * m.held[0][0],
        lambda m: m.held[0].append(m.held[0].pop() + 2),
    ),
    "an object in a list in a dict": (
        lambda: {"all": [Gain()]},
        lambda m, x: x * m.held["all"][0].gain,
        lambda m: setattr(m.held["all"][0], "gain", 3.0),
    ),
    "an object four objects deep": (
        lambda: Outer(Outer(types.SimpleNamespace(inner=Gain()))),
        lambda m, x: x * m.held.inner.inner.inner.gain,
        lambda m: setattr(m.held.inner.inner.inner, "gain", 3.0),
    ),
    "an object in the middle": (
        lambda: Outer(Outer(Gain())),
        lambda m, x: x * m.held.inner.inner.gain,
        lambda m: setattr(m.held, "inner", Outer(Gain(3.0))),
    ),
    "an element of an array": (
        lambda: numpy.ones(8, numpy.float32),
        lambda m, x: x * float(m.held[0]),
        lambda m: m.held.fill(3),
    ),
    "a number of numpy": (
        lambda: numpy.float32(1),
        lambda m, x: x * float(m.held),
        lambda m: setattr(m, "held", numpy.float32(3)),
    ),
    "a slot": (
        Slotted,
        lambda m, x: x * m.held.gain,
        lambda m: setattr(m.held, "gain", 3.0),
    ),
    "a deque": (
        lambda: collections.deque([1.0]),
        lambda m, x: x * m.held[0],
        lambda m: m.held.appendleft(3.0),
    ),
    "the order of a dict": (
        lambda: collections.OrderedDict(a=1.0, b=3.0),
        lambda m, x: x * next(iter(m.held.values())),
        lambda m: m.held.move_to_end("a"),
    ),
    "a set": (
        lambda: {1},
        lambda m, x: x * len(m.held),
        lambda m: m.held.add(2),
    ),
    "a named tuple": (
        lambda: Point(1.0),
        lambda m, x: x * m.held.gain,
        lambda m: setattr(m, "held", Point(3.0)),
    ),
    "an attribute of a dict": (
        lambda: Mapping(a=1),
        lambda m, x: x * getattr(m.held, "gain", 1.0),
        lambda m: setattr(m.held, "gain", 3.0),
    ),
    "the sign of zero": (
        lambda: 0.0,
        lambda m, x: m.held / x.abs(),
        lambda m: setattr(m, "held", -0.0),
    ),
    "what a property reads": (
        Computed,
        lambda m, x: x * m.held.gain,
        lambda m: setattr(m.held, "_gain", 3.0),
    ),
    "what __getattr__ reads": (
        Looked,
        lambda m, x: x * m.held.gain,
        lambda m: m.held.__dict__["_content"].update(gain=3.0),
    ),
    "what __getattribute__ reads": (
        Remapped,
        lambda m, x: x * m.held.gain,
        lambda m: setattr(m.held, "factor", 3.0),
    ),
    "what vars() shows": (
        Gain,
        lambda m, x: x * vars(m.held)["gain"],
        lambda m: setattr(m.held, "gain", 3.0),
    ),
    "how much vars() shows": (
        Gain,
        lambda m, x: x * len(vars(m.held)),
        lambda m: setattr(m.held, "late", 3.0),
    ),
    "what vars() of the module shows": (
        lambda: 1.0,
        lambda m, x: x * vars(m)["held"],
        lambda m: setattr(m, "held", 3.0),
    ),
    "inside of a strategy": (
        lambda: Strategy(1.0),
        lambda m, x: m.held(x),
        lambda m: setattr(m.held.config.inner, "gain", 3.0),
    ),
    "the object of a method": (
        lambda: Strategy(1.0).__call__,
        lambda m, x: m.held(x),
        lambda m: setattr(m.held.__self__.config.inner, "gain", 3.0),
    ),
    "the arguments of a partial": (
        lambda: functools.partial(times_first, [1.0]),
        lambda m, x: m.held(x),
        lambda m: m.held.args[0].insert(0, 3.0),
    ),
    "a closure": (
        lambda: enclosing({"gain": 1.0}),
        lambda m, x: m.held(x),
        lambda m: setattr(m, "held", enclosing({"gain": 3.0})),
    ),
    "an attribute that comes": (
        Gain,
        lambda m, x: x * getattr(m.held, "late", 1.0),
        lambda m: setattr(m.held, "late", 3.0),
    ),
    "a module that is no part of the model": (
        lambda: [nn.Dropout(0.0)],
        lambda m, x: x * (1 + m.held[0].p),
        lambda m: setattr(m.held[0], "p", 0.5),
    ),
    "the mode of such a module": (
        lambda: [nn.Identity()],
        lambda m, x: x * 3 if m.held[0].training else x,
        lambda m: m.held[0].eval(),
    ),
    "what is inside of such a module": (
        lambda: [nn.Sequential(nn.Tanh())],
        lambda m, x: m.held[0](x),
        lambda m: m.held[0].__setitem__(0, nn.Sigmoid()),
    ),
    "what a weak reference leads to": (
        lambda: weakref.ref(REFERRED_TO),
        lambda m, x: x * m.held().gain,
        lambda m: setattr(m.held(), "gain", 3.0),
    ),
    "a slice": (
        lambda: slice(0, 4),
        lambda m, x: x[..., m.held],
        lambda m: setattr(m, "held", slice(4, 8)),
    ),
    "a path": (
        lambda: pathlib.PurePath("a"),
        lambda m, x: x * len(str(m.held)),
        lambda m: setattr(m, "held", pathlib.PurePath("abc")),
    ),
    "an array of Python's": (
        lambda: array.array("f", [1.0]),
        lambda m, x: x * m.held[0],
        lambda m: m.held.append(m.held.pop() + 2),
    ),
    "the size of a tensor": (
        lambda: torch.ones(4),
        lambda m, x: x * m.held.sum() / m.held.numel(),
        lambda m: setattr(m, "held", torch.arange(5.0)),
    ),
    "the size of a buffer": (
        lambda: nn.Buffer(torch.ones(4)),
        lambda m, x: x * m.held.sum() / m.held.numel(),
        lambda m: setattr(m, "held", torch.arange(5.0)),
    ),
    "the size of a parameter": (
        lambda: nn.Parameter(torch.ones(4)),
        lambda m, x: x * m.held.sum() / m.held.numel(),
        lambda m: setattr(m, "held", nn.Parameter(torch.arange(5.0))),
    ),
}


class Holds(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.layer = nn.Linear(8, 8)
        self.held = CASES[name][0]()

    def forward(self, x: Tensor) -> Tensor:
        return CASES[self.name][1](self, self.layer(x))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


@pytest.mark.parametrize("name", CASES)
def test_another_value_is_another_graph_and_the_same_value_is_not(name: str):
    model = Holds(name)
    converted = mpgraph.convert(copy.deepcopy(model), "bf16", policy="autocast-cpu")
    x = torch.randn(4, 8)

    def check(graphs: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            want = model(x)
        assert torch.equal(bits(converted(x)), bits(want))
        assert len(state_of(converted).specialisations()) == graphs

    check(1)
    check(1)
    for subject in (model, converted):
        CASES[name][2](subject)
    check(2)
    check(2)


class Shares(nn.Module):
    config = Gain()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def factor(self) -> float:
        return self.config.gain

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.factor()


def test_an_object_of_the_class_and_a_method_of_it_are_read_too(monkeypatch: Any):
    model = mpgraph.convert(Shares(), "bf16")
    x = torch.randn(4, 8)
    once = model(x)
    monkeypatch.setattr(Shares.config, "gain", 2.0)
    assert torch.equal(model(x), once * 2)
    monkeypatch.setattr(Shares, "factor", lambda self: 4.0)
    assert torch.equal(model(x), once * 4)


class Follows(nn.Module):
    """Holds what changes at every step without being read, as a trainer does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.trainer = types.SimpleNamespace(logger=Outer(Gain()))
        self.owner = Outer(Gain())
        self.history: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.owner.inner.gain


def test_what_forward_does_not_read_may_change():
    model = mpgraph.convert(Follows(), "bf16")
    x = torch.randn(4, 8)
    for step in range(4):
        model(x)
        model.history.append(float(step))
        model.trainer.step = step
        model.owner.inner.step = step
        model.owner = Outer(Gain())  # equal in all that is read
    assert len(state_of(model).specialisations()) == 1


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(8, 8), 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.cond(y.sum() > 0, lambda v: v * self.gain, lambda v: v - self.gain, (y,))


@torch.no_grad()
def test_what_a_branch_reads_that_dynamo_traces_is_noted():
    model = mpgraph.convert(Branches(), "bf16", capture="export")
    plain, x = copy.deepcopy(model), torch.randn(4, 8)
    model(x)
    for gain in (3.0, 1.0):
        model.gain = plain.gain = gain
        fresh = mpgraph.convert(Branches(), "bf16", capture="export")
        fresh.load_state_dict(model.state_dict())
        fresh.gain = gain
        assert torch.equal(model(x), fresh(x))
    assert len(state_of(model).specialisations()) == 2


class Grows(nn.Module):
    """Keeps what it has seen, and looks at how much that is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.seen = torch.zeros(0, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x])
        return self.layer(self.seen) * torch.arange(len(self.seen))[:, None]


class Renews(nn.Module):
    """Puts other tensors into a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.states = [torch.zeros(4, 8)]

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x) + self.states[0])
        self.states = [y.detach()]
        return y


@pytest.mark.parametrize("cls", [Grows, Renews])
@pytest.mark.filterwarnings("ignore:mpgraph")
def test_state_that_moves_at_every_call_does_not_make_a_graph_per_call(cls: Any):
    model = cls()
    converted = mpgraph.convert(copy.deepcopy(model), "bf16", policy="autocast-cpu")
    for _ in range(6):
        x = torch.randn(4, 8)
        with torch.autocast("cpu", torch.bfloat16):
            want = model(x)
        assert torch.equal(converted(x), want)
    assert len(state_of(converted).specialisations()) == 2


def test_listening_leaves_no_trace_on_the_classes():
    model = Holds("inside of a strategy")
    with attribute_reads(model) as record:
        model(torch.randn(2, 8))
    (names,) = [root.names for root in record.reads.values() if root.owner is model]
    assert "gain" in names["held"]["config"]["inner"]
    for cls in (nn.Module, Strategy, Gain, Holds):
        assert "__getattribute__" not in vars(cls)


class Counts(nn.Module):
    """Counts its calls in an object that hangs deep."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.held = Outer(Outer(Outer(held)))

    def forward(self, x: Tensor) -> Tensor:
        count(self.held.inner.inner.inner)
        return self.layer(x)


def count(held: Any) -> None:
    if isinstance(held, collections.deque):
        held.append(1.0)
    else:
        held.gain += 1


@pytest.mark.parametrize("held", [Gain, Slotted, lambda: collections.deque([1.0])])
@pytest.mark.filterwarnings("ignore:mpgraph")
def test_what_forward_changes_deep_inside_changes_at_every_call(held: Callable[[], Any]):
    model = mpgraph.convert(Counts(held()), "bf16")
    for _ in range(3):
        model(torch.randn(2, 8))
    deep = model.held.inner.inner.inner
    assert (sum(deep) if isinstance(deep, collections.deque) else deep.gain) == 4


def test_an_export_that_is_refused_changes_nothing_deep_inside():
    model = mpgraph.convert(Counts(Gain()), "bf16", capture="export")
    with pytest.raises(mpgraph.CaptureError, match=r"held by 'held\.inner\.inner\.inner'"):
        model(torch.randn(2, 8))
    assert model.held.inner.inner.inner.gain == 1


@pytest.mark.parametrize("name", ["a tensor in a dict", "an object four objects deep"])
def test_a_step_sees_it_too(name: str):
    model = Holds(name)
    plain = mpgraph.convert(copy.deepcopy(model), "bf16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).float().square().mean()

    step = mpgraph.TrainStep(model, optimizer, loss_fn, precision="bf16", compile=False)
    x = torch.randn(4, 8)
    assert step(x) == loss_fn(plain, x)
    plain.load_state_dict(model.state_dict())
    for subject in (step.model, plain):
        CASES[name][2](subject)
    assert step(x) == loss_fn(plain, x)


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.loss = Outer(Gain())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_step_sees_what_its_loss_function_reads_of_modules():
    model, teacher = Weighted(), Holds("a list in a list")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def loss_fn(model: Any, x: Tensor) -> Tensor:
        return (model(x) - teacher(x)).square().mean() * model.loss.inner.gain

    step = mpgraph.TrainStep(model, optimizer, loss_fn, precision="fp32", compile=False)
    x = torch.randn(4, 8)
    assert step(x) == loss_fn(model, x)
    step.model.loss.inner.gain = 3.0
    assert step(x) == loss_fn(model, x)
    teacher.held[0][0] = 5.0
    assert step(x) == loss_fn(model, x)


class Chained(nn.Module):
    """Walks along a chain of objects."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.held: Any = None
        for gain in range(500):
            self.held = Outer((gain, self.held))

    def forward(self, x: Tensor) -> Tensor:
        gain, link = 0, self.held
        while link is not None:
            gain, link = gain + link.inner[0], link.inner[1]
        return self.layer(x) * gain


def test_a_chain_too_long_to_compare_is_refused_by_its_reason():
    model = mpgraph.convert(Chained(), "bf16", capture="export")
    with pytest.raises(mpgraph.CaptureError, match="100 objects deep"):
        model(torch.randn(2, 8))


@pytest.mark.parametrize("name", ["a slice", "a path"])
def test_an_equal_value_in_the_place_of_another_is_the_same_graph(name: str):
    model, x = mpgraph.convert(Holds(name), "bf16"), torch.randn(2, 8)
    model(x)
    model.held = CASES[name][0]()
    model(x)
    assert len(state_of(model).specialisations()) == 1


class Advances(nn.Module):
    def __init__(self, numbers: Any) -> None:
        super().__init__()
        self.layer, self.numbers = nn.Linear(8, 8), numbers

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * next(self.numbers)


@pytest.mark.parametrize(
    "make",
    [lambda: iter([1, 2, 3]), lambda: itertools.count(1), lambda: itertools.cycle([1, 2])],
    ids=["a list", "a count", "a cycle"],
)
@pytest.mark.filterwarnings("ignore:mpgraph")
def test_an_iterator_goes_on_at_every_call(make: Callable[[], Any]):
    model, x = mpgraph.convert(Advances(make()), "bf16"), torch.randn(2, 8)
    first, second = model(x), model(x)
    assert torch.equal(second, first * 2)


class Draws(nn.Module):
    def __init__(self, numbers: Any) -> None:
        super().__init__()
        self.layer, self.numbers = nn.Linear(8, 8), numbers

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * float(self.numbers.random(1)[0])


@pytest.mark.parametrize("make", [numpy.random.RandomState, numpy.random.default_rng])
@pytest.mark.filterwarnings("ignore:mpgraph")
def test_numbers_from_a_generator_of_numpys_are_drawn_at_every_call(make: Callable[[int], Any]):
    plain = Draws(make(0))
    model = mpgraph.convert(copy.deepcopy(plain), "bf16", policy="autocast-cpu")
    x = torch.randn(2, 8)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            want = plain(x)
        assert torch.equal(model(x), want)


def test_a_random_number_generator_that_both_engines_would_freeze_is_refused():
    numbers = random.Random(0)
    model = mpgraph.convert(
        Draws(types.SimpleNamespace(random=lambda n: [numbers.random()])), "bf16"
    )
    before = numbers.getstate()
    with pytest.raises(mpgraph.CaptureError, match=r"a random\.Random of the model's own"):
        model(torch.randn(2, 8))
    assert numbers.getstate() == before
