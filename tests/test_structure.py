from __future__ import annotations

import collections
import dataclasses
import enum
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

from mpgraph.structure import (
    Leaf,
    Node,
    Opaque,
    Plain,
    flatten,
    leaf_names,
    opaque_values,
    unflatten,
)


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Output:
    logits: Any
    hidden: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: Any

    def __post_init__(self):
        raise AssertionError("rebuilding must not run __post_init__")


class Layer:
    """A part of a key-value cache, as transformers has it."""

    def __init__(self, keys, values):
        self.keys, self.values, self.is_initialized = keys, values, True


class Cache:
    def __init__(self, *layers):
        self.layers = list(layers)
        self.seen = 7

    def __eq__(self, other):
        return isinstance(other, Cache)

    __hash__ = None


class Registered:
    def __init__(self, items, tag):
        self.items, self.tag = items, tag


class Color(enum.Enum):
    RED = 1


pytree.register_pytree_node(
    Registered,
    lambda r: (r.items, {"tag": r.tag}),  # a context that cannot be hashed
    lambda items, context: Registered(list(items), context["tag"]),
    serialized_type_name="mpgraph.tests.Registered",
)


class Result(collections.OrderedDict):
    """As Hugging Face's models return."""


pytree.register_pytree_node(
    Result,
    lambda r: ([*r.values()], [*r]),
    lambda values, keys: Result(zip(keys, values, strict=True)),
    serialized_type_name="mpgraph.tests.Result",
)


def t(value: float = 0.0) -> torch.Tensor:
    return torch.tensor(value)


def parts(value: Any) -> Any:
    """A value as something that compares, tensors by identity."""
    if isinstance(value, torch.Tensor):
        return id(value)
    if isinstance(value, dict):
        return type(value), [(k, parts(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [parts(v) for v in value]
    if dataclasses.is_dataclass(value) or isinstance(value, (Cache, Layer, Registered)):
        return type(value), [(k, parts(v)) for k, v in vars(value).items()]
    return type(value), value


@pytest.mark.parametrize(
    "value",
    [
        t(),
        [t(), (t(), 3)],
        {"b": t(), "a": [None, "text", t()]},
        {1: t(), 0: t()},
        collections.OrderedDict(z=t(), a=t()),
        Point(t(), [t()]),
        Output(t(), (t(), t())),
        Output(t()),
        torch.Size([2, 3]),
        None,
        (),
        {},
        [[], {}, ()],
        {"dtype": torch.bfloat16, "device": torch.device("cpu"), "flag": True, "n": 1, "r": 2.0},
        Color.RED,
        slice(1, 2),
        Registered([t(), t(1.0)], "tag"),
        Cache(Layer(t(), t()), Layer(t(), None)),
        (Cache(Layer(t(), t())), {"cache": Cache(Layer(t(), t()))}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_taken_apart_is_put_together_again(value):
    leaves, spec = flatten(value)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert parts(unflatten(spec, leaves)) == parts(value)
    assert flatten(unflatten(spec, leaves))[1] == spec


def test_a_dataclass_is_built_without_its_constructor():
    made = object.__new__(Frozen)
    object.__setattr__(made, "value", t())
    leaves, spec = flatten(made)
    assert unflatten(spec, leaves).value is leaves[0]


def test_a_rebuilt_container_is_a_new_one_with_other_tensors():
    cache = Cache(Layer(t(1.0), t(2.0)))
    leaves, spec = flatten(cache)
    other = unflatten(spec, [leaf + 1 for leaf in leaves])
    assert other is not cache
    assert (other.layers[0].keys.item(), other.layers[0].values.item()) == (2.0, 3.0)
    assert (cache.layers[0].keys.item(), other.seen) == (1.0, 7)


def test_a_subclass_of_dict_that_nobody_registered_keeps_its_attributes_or_is_opaque():
    class Encoding(dict):
        pass

    _, spec = flatten(Encoding(a=t()))
    assert isinstance(spec, (Opaque, Node))


def test_parameters_and_sizes_are_leaves():
    parameter = nn.Parameter(t())
    leaves, spec = flatten((parameter, torch.zeros(2).shape))
    assert leaves[0] is parameter
    assert len(leaves) == 1
    assert isinstance(spec.children[1], Node)


def test_objects_without_tensors_are_not_entered():
    class Config:
        def __init__(self):
            self.size = 3

    config = Config()
    leaves, spec = flatten({"config": config, "module": nn.Linear(2, 2), "f": print})
    assert leaves == []
    assert next(iter(opaque_values(spec))) is config
    assert len(list(opaque_values(spec))) == 3
    assert unflatten(spec, leaves)["config"] is config


def test_an_object_that_holds_itself_is_entered_once_when_it_is_searched():
    class Loop:
        def __init__(self):
            self.me = self

    _, spec = flatten(Loop())
    assert isinstance(spec, Opaque)


def test_names_come_from_keys_fields_and_positions():
    value = ((), {"ids": t(), "cache": Cache(Layer(t(), t())), "p": Point(t(), [t(), t()])})
    _, spec = flatten(value)
    assert list(leaf_names(spec)) == [
        "1_ids",
        "1_cache_layers_0_keys",
        "1_cache_layers_0_values",
        "1_p_x",
        "1_p_y_0",
        "1_p_y_1",
    ]


def test_a_registered_mapping_gives_its_keys_as_names():
    result = Result(loss=t(1), logits=[t(2), t(3)])
    leaves, spec = flatten(result)
    assert list(leaf_names(spec)) == ["loss", "logits_0", "logits_1"]
    assert unflatten(spec, leaves) == result
    assert type(unflatten(spec, leaves)) is Result


# --- Descriptions as keys ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0, False),
        (True, 1.0),
        (None, False),
        ("a", b"a"),
        ([1], (1,)),
        ([], ()),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": 1}, collections.OrderedDict(a=1)),
        ((2, 3), torch.Size([2, 3])),
        ((1, 2), Point(1, 2)),
        (t(), None),
        ([t()], [t(), t()]),
        (torch.float32, torch.bfloat16),
        (Registered([t()], "a"), Registered([t()], "b")),
        (Output(t()), Output(t(), t())),
        (0.0, -0.0),
        ({1: 2}, {True: 2}),
        ((1, [True]), (1, [1])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_different_values_have_different_descriptions(one, other):
    assert flatten(one)[1] != flatten(other)[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: (1, True, 1.0, None),
        lambda: {"a": [t(), Point(t(), 2)]},
        lambda: Registered([t(), t()], "a"),
        lambda: Cache(Layer(t(), t())),
        lambda: float("nan"),
        lambda: [float("nan")],
    ],
)
def test_equal_values_have_equal_descriptions_and_hashes(make):
    one, other = flatten(make())[1], flatten(make())[1]
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other}) == 1


def test_opaque_objects_equal_only_themselves():
    class Thing:
        def __eq__(self, other):
            return True

        __hash__ = None

    thing = Thing()
    assert flatten(thing)[1] == flatten(thing)[1]
    assert flatten(thing)[1] != flatten(Thing())[1]
    assert hash(flatten(thing)[1]) == hash(flatten(thing)[1])


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from([0.0, -0.0, 1.0, 2.5]),
    st.text(max_size=2), st.sampled_from([torch.float32, torch.bfloat16, Color.RED]),
)  # fmt: skip
LEAVES = st.builds(lambda: t())
KEYS = st.one_of(st.text(max_size=2), st.integers(0, 3))


def containers(inner):
    lists = st.lists(inner, max_size=3)
    return st.one_of(
        lists,
        lists.map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(collections.OrderedDict),
        st.builds(Point, inner, inner),
        st.builds(Output, inner, inner),
        st.builds(lambda items: Registered(items, "tag"), lists),
        st.builds(lambda a, b: Cache(Layer(a, b), Layer(t(), b)), inner, inner),
    )


VALUES = st.recursive(st.one_of(PLAIN, LEAVES), containers, max_leaves=12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(VALUES)
def test_any_nested_value_survives_the_round_trip(value):
    leaves, spec = flatten(value)
    again = unflatten(spec, leaves)
    assert parts(again) == parts(value)
    other_leaves, other = flatten(again)
    assert other == spec
    assert hash(other) == hash(spec)
    assert [id(leaf) for leaf in other_leaves] == [id(leaf) for leaf in leaves]
    assert len(list(leaf_names(spec))) == len(leaves)


def test_the_parts_of_a_description():
    assert flatten(t())[1] == Leaf()
    assert flatten(3)[1] == Plain(int, 3, 3)
