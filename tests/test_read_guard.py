"""Whether what was read is what it was: asked at every call, so it has to be quick."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from mpgraph import read_guard
from mpgraph.read_guard import ReadGuard, ReadVersions


class Part:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def enclosing(words: list[str]) -> Callable[[], int]:
    return lambda: len(words)


Change = Callable[[Any], Any]
# What is held; what was read inside of it; what changes it; what puts back what it was worth.
CASES: dict[str, tuple[Any, Any, Change, Change]] = {
    "a list": (["a", "b"], {}, lambda v: v.append("c"), lambda v: v.pop()),
    "a dict": ({"a": 1}, {}, lambda v: v.update(b=2), lambda v: v.pop("b")),
    "a key of a dict": ({1: "a"}, {}, lambda v: v.update({True: v.pop(1)}), lambda v: v.clear()),
    "a set": ({"a"}, {}, lambda v: v.add("b"), lambda v: v.remove("b")),
    "a list in a tuple": (([1],), {}, lambda v: v[0].append(2), lambda v: v[0].pop()),
    "a closure": (
        enclosing(["a"]),
        {},
        lambda v: v.__closure__[0].cell_contents.append("b"),
        lambda v: v.__closure__[0].cell_contents.pop(),
    ),
    "an object in a list": (
        [Part(a=1)],
        {(0,): {"a": {}}},
        lambda v: setattr(v[0], "a", 2),
        lambda v: setattr(v[0], "a", 1),
    ),
    "an object of C's": (
        types.SimpleNamespace(a=[1]),
        {},
        lambda v: v.a.append(2),
        lambda v: v.a.pop(),
    ),
}  # fmt: skip


def holds(guard: ReadGuard) -> bool:
    return guard.is_untouched() or guard.is_equal()


@pytest.mark.parametrize("name", CASES)
def test_what_is_the_same_still_is_not_frozen_again(name: str, monkeypatch: Any):
    held, names, change, undo = CASES[name]
    module = nn.Identity()
    module.held = held
    guard = ReadGuard()
    guard.add({id(vars(module)): (module, {"held": names})})
    with monkeypatch.context() as patch:
        patch.setattr(read_guard, "freeze", lambda *_: pytest.fail("freezes again"))
        assert holds(guard)
    change(held)
    assert not holds(guard)
    undo(held)
    assert holds(guard) == (name != "a key of a dict")


def test_what_refers_to_itself_is_looked_at_once():
    module = nn.Identity()
    module.held = held = Part(items=[])
    held.items += [held, held.items]
    guard = ReadGuard()
    guard.add({id(vars(module)): (module, {"held": {"items": {(0,): {"items": {}}}}})})
    assert holds(guard)
    held.items.append(1)
    assert not holds(guard)


def test_an_equal_number_in_the_place_of_one_costs_no_more():
    module = nn.Identity()
    module.gain = 1e3
    guard = ReadGuard()
    guard.add({id(vars(module)): (module, {"gain": {}})})
    module.gain = float("1e3")
    assert guard.is_untouched()
    module.gain = 1000
    assert not holds(guard)
    module.gain = 1e3
    assert guard.is_untouched()


def test_the_number_of_earlier_values_is_found_again():
    module = nn.Identity()
    versions = ReadVersions()
    numbers = []
    for gain in (1.0, 2.0, 1.0, 2.0):
        module.gain = gain
        numbers.append(versions.number())
        versions.note({id(vars(module)): (module, {"gain": {}})})
    assert numbers == [0, 1, 0, 1]
