"""Draw the random numbers of a step from a counter, so that every runtime draws the same."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from mpgraph import ir
from mpgraph.errors import ExportError
from mpgraph.onnx.philox import uniform
from mpgraph.pipeline import graph_pass
from mpgraph.step.joint import StepContext, append, slot_node
from mpgraph.step.slots import StepSlot

aten = torch.ops.aten
Draw = Callable[[Sequence[Any]], Tensor]

# What an exported step starts with; both are part of its state.
SEED = StepSlot("random", "random.seed", lambda: torch.tensor(0))
STEP = StepSlot("random", "random.step", lambda: torch.tensor(0))


@graph_pass(numerics="rounds")
def counter_dropout(graph: fx.Graph, context: StepContext) -> int:
    """Rewrite ``bernoulli(x, p)`` to ``philox(seed, step, which) < p``, and count the steps.

    ``native_dropout``, ``rand`` and their like follow. Seed and step become inputs, and the next
    step is written. Left alone: a graph without random numbers.

    Raises:
        ExportError: A node draws from another distribution.
    """
    drawing = [node for node in graph.nodes if ir.is_random(node)]
    if not drawing:
        return 0
    mode = next(n.meta["val"] for n in graph.nodes if _is_tensor(n)).fake_mode
    seed, step = (slot_node(graph, s, mode.from_tensor(torch.tensor(0))) for s in (SEED, STEP))
    for stream, node in enumerate(drawing):
        _replace(graph, node, stream, [seed, step])
    for place, following in zip((seed, step), append(graph, _next, [seed, step], "update")):  # noqa: B905
        with graph.inserting_before(graph.output_node()):
            write = graph.call_function(aten.copy_.default, (place, following))
        write.meta = {"val": place.meta["val"], "part": "write"}
    return len(drawing) + 2


def _next(seed: Tensor, step: Tensor) -> list[Tensor]:
    # The seed is written as it is, which makes it state: it is saved, and goes on with the rest.
    return [seed + 0, step + 1]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _replace(graph: fx.Graph, node: fx.Node, stream: int, places: list[fx.Node]) -> None:
    row = ROWS.get(cast(OpOverload, node.target))
    if row is None:
        raise ExportError(_unknown(node))
    inputs = [*dict.fromkeys(ir.argument_nodes(node))]

    def traced(seed: Tensor, step: Tensor, *values: Any) -> list[Tensor]:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        draw: Draw = functools.partial(_drawn, stream=stream, seed=seed, step=step)
        found = row(draw, *args, **kwargs)
        return [*found] if isinstance(found, tuple) else [found]

    made = append(graph, traced, [*places, *inputs], node.meta.get("part", "forward"), node)
    keys = ("module_path", "stack_trace", "nn_module_stack")
    for new in made:
        new.meta.update((key, node.meta[key]) for key in keys if key in node.meta)
    _put(graph, node, made)


def _drawn(shape: Sequence[Any], stream: int, seed: Tensor, step: Tensor) -> Tensor:
    return uniform(shape, stream, seed, step)


def _put(graph: fx.Graph, node: fx.Node, made: list[fx.Node]) -> None:
    """Use what was made instead of the node, which may have written it to its argument."""
    if ir.is_mutating(node):
        with graph.inserting_before(node):
            write = graph.call_function(aten.copy_.default, (node.args[0], made[0]))
        write.meta = dict(node.meta)
        made = [write]
    if len(made) == 1:
        node.replace_all_uses_with(made[0])
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(made[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)


def _bernoulli(draw: Draw, x: Tensor, p: Any = 0.5, **_: Any) -> Tensor:
    found: Tensor = (draw(x.shape) < p).to(x.dtype)
    return found


def _native_dropout(draw: Draw, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    mask = draw(x.shape) < 1 - p
    return x * mask * (1 / (1 - p) if p < 1 else 0.0), mask


def _normal(draw: Draw, shape: Sequence[Any]) -> Tensor:
    """Two uniform numbers each (Box and Muller, 1958); 1 - u is never 0."""
    radius, angle = draw((*shape, 2)).unbind(-1)
    found: Tensor = torch.sqrt(-2 * torch.log(1 - radius)) * torch.cos(2 * math.pi * angle)
    return found


def _exponential(draw: Draw, x: Tensor, rate: float = 1.0, **_: Any) -> Tensor:
    """The logarithm of a uniform number; never 0, whose logarithm a Gumbel distribution takes."""
    found: Tensor = (-torch.log(1 - draw(x.shape))).clamp(min=2.0**-24) / rate
    return found.to(x.dtype)


def _integers(draw: Draw, low: int, high: int, shape: Sequence[Any]) -> Tensor:
    """From ``low`` up to ``high`` - 1, in integers."""
    if high - low > _MOST_INTEGERS:
        raise ExportError(
            f"random integers from {low} to {high - 1} are more than the 2**24 different numbers "
            "that exported steps draw. Pass them with the batch."
        )
    bits = (draw(shape) * _MOST_INTEGERS).to(torch.int64)
    return torch.div(bits * (high - low), _MOST_INTEGERS, rounding_mode="trunc") + low


_MOST_INTEGERS = 1 << 24


def _randint(draw: Draw, low: int, high: int, size: Any, **options: Any) -> Tensor:
    return _integers(draw, low, high, size).to(options.get("dtype") or torch.int64)


def _randint_like(draw: Draw, x: Tensor, low: int, high: int, **options: Any) -> Tensor:
    return _integers(draw, low, high, x.shape).to(options.get("dtype") or x.dtype)


def _permutation(draw: Draw, count: Any, **options: Any) -> Tensor:
    """The order of random numbers."""
    return torch.argsort(draw((count,))).to(options.get("dtype") or torch.int64)


def _normal_around(draw: Draw, mean: Any, std: Any, **_: Any) -> Tensor:
    like: Tensor = mean + std
    found: Tensor = (_normal(draw, like.shape) * std + mean).to(like.dtype)
    return found


def _dtype(options: dict[str, Any]) -> torch.dtype:
    return options.get("dtype") or torch.get_default_dtype()


ROWS: dict[OpOverload, Callable[..., Any]] = {
    aten.bernoulli.default: lambda draw, x, **_: (draw(x.shape) < x).to(x.dtype),
    aten.bernoulli.p: _bernoulli,
    aten.bernoulli_.float: _bernoulli,
    aten.native_dropout.default: _native_dropout,
    aten.rand.default: lambda draw, size, **options: draw(size).to(_dtype(options)),
    aten.rand_like.default: lambda draw, x, **_: draw(x.shape).to(x.dtype),
    aten.uniform_.default: lambda draw, x, low=0.0, high=1.0, **_: (
        draw(x.shape) * (high - low) + low
    ).to(x.dtype),
    aten.randn.default: lambda draw, size, **options: _normal(draw, size).to(_dtype(options)),
    aten.randn_like.default: lambda draw, x, **_: _normal(draw, x.shape).to(x.dtype),
    aten.normal.float_float: lambda draw, mean, std, size, **options: (
        _normal(draw, size) * std + mean
    ).to(_dtype(options)),
    aten.normal.Tensor_float: lambda draw, mean, std=1.0, **_: _normal_around(draw, mean, std),
    aten.normal.float_Tensor: _normal_around,
    aten.normal.Tensor_Tensor: _normal_around,
    aten.exponential_.default: _exponential,
    aten.randint.default: lambda draw, high, size, **o: _randint(draw, 0, high, size, **o),
    aten.randint.low: _randint,
    aten.randint_like.default: lambda draw, x, high, **o: _randint_like(draw, x, 0, high, **o),
    aten.randint_like.low_dtype: _randint_like,
    aten.randperm.default: _permutation,
    aten.normal_.default: lambda draw, x, mean=0.0, std=1.0, **_: (
        _normal(draw, x.shape) * std + mean
    ).to(x.dtype),
}


def _unknown(node: fx.Node) -> str:
    line = ir.source_line(node)
    return (
        f"%{node.name} ({node.target}) draws random numbers in a way that exported steps do not "
        "know: they know dropout, bernoulli, uniform, normal and exponential numbers, random "
        "integers and permutations. Draw in one of these ways, or pass the numbers with the batch."
        + (f"\n  from: {line}" if line else "")
    )
