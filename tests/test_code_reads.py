"""What forward reads besides attributes: of hooks, of classes, of objects that its code names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpgraph
from mpgraph.module import state_of


class Scales:
    gain: Any = 1.0

    def __call__(self, module: Any, args: Any, result: Tensor) -> Tensor:
        return result * self.gain


class Constants:
    gain = 1.0

    class Inner:
        gain = 1.0


SETTINGS = Scales()


class Named(nn.Module):
    base, held, own = 1.0, Scales(), Scales()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    @classmethod
    def of_the_class(cls) -> float:
        return cls.base

    @property
    def computed(self) -> float:
        return type(self).base

    @functools.cached_property
    def cached(self) -> float:
        return type(self).base

    @staticmethod
    def alone() -> float:
        return 1.0


def enclosing(held: dict[str, float]) -> Callable[..., Tensor]:
    return lambda module, args, result: result * held["gain"]


HOOKS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "an object": (Scales, lambda hook: setattr(hook, "gain", 3.0)),
    "a method": (lambda: Scales().__call__, lambda hook: setattr(hook.__self__, "gain", 3.0)),
    "a closure": (
        lambda: enclosing({"gain": 1.0}),
        lambda hook: hook.__closure__[0].cell_contents.update(gain=3.0),
    ),
    "a partial function": (
        lambda: functools.partial(Scales.__call__, Scales()),
        lambda hook: setattr(hook.args[0], "gain", 3.0),
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_the_state_of_a_hook_is_part_of_the_graph(name: str):
    make, change = HOOKS[name]
    model = Wraps(Named())
    hook = make()
    model.inner.layer.register_forward_hook(hook)
    converted, x = mpgraph.convert(model, "bf16", policy="autocast-cpu"), torch.randn(4, 8)
    check(model, converted, x, 1)
    change(hook)
    check(model, converted, x, 2)


class Wraps(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner.layer(x)


def check(model: nn.Module, converted: nn.Module, x: Tensor, graphs: int) -> None:
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            want = model(x)
        assert torch.equal(converted(x), want)
        assert len(state_of(converted).specialisations()) == graphs


class OfItsClass(Named):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * type(self).held.gain


class OfAName(Named):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * OfAName.own.gain


class InAClassMethod(Named):
    base = 1.0

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * self.of_the_class()


class InAProperty(Named):
    base = 1.0

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * self.computed


class OfAStaticMethod(Named):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * self.alone()


class OfAnotherClass(Named):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * Constants.gain


class OfANestedClass(Named):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * Constants.Inner.gain


class OfAGlobalObject(Named):
    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * SETTINGS.gain


@pytest.mark.parametrize(
    ("cls", "place", "name", "value"),
    [
        (OfItsClass, Named.held, "gain", 3.0),
        (OfAName, Named.own, "gain", 3.0),
        (InAClassMethod, InAClassMethod, "base", 3.0),
        (InAProperty, InAProperty, "base", 3.0),
        (OfAStaticMethod, OfAStaticMethod, "alone", staticmethod(lambda: 3.0)),
        (OfAnotherClass, Constants, "gain", 3.0),
        (OfANestedClass, Constants.Inner, "gain", 3.0),
        (OfAGlobalObject, SETTINGS, "gain", 3.0),
        (OfAGlobalObject, globals(), "SETTINGS", Scales()),
    ],
)
def test_another_value_is_another_graph(
    cls: Any, place: Any, name: str, value: Any, monkeypatch: Any
):
    model = cls()
    converted, x = mpgraph.convert(model, "bf16", policy="autocast-cpu"), torch.randn(4, 8)
    check(model, converted, x, 1)
    if isinstance(place, dict):
        value.gain = 3.0
        monkeypatch.setitem(place, name, value)
    else:
        monkeypatch.setattr(place, name, value, raising=False)
    check(model, converted, x, 2)
    monkeypatch.undo()
    check(model, converted, x, 2)


def test_what_is_not_read_of_a_global_object_may_change():
    model = mpgraph.convert(OfAGlobalObject(), "bf16")
    for step in range(3):
        model(torch.randn(2, 8))
        SETTINGS.step = step
    assert len(state_of(model).specialisations()) == 1


class Counts(Named):
    def forward(self, x: Tensor) -> Any:
        SETTINGS.count = getattr(SETTINGS, "count", 0) + 1
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:mpgraph")
def test_what_forward_changes_in_a_global_object_changes_at_every_call():
    model = mpgraph.convert(Counts(), "bf16")
    try:
        for _ in range(3):
            model(torch.randn(2, 8))
        assert SETTINGS.count == 3
    finally:
        vars(SETTINGS).pop("count", None)
