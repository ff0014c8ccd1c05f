"""What a case of the survey is, and what it is called with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Ints:
    """Integers from 0 up to a bound."""

    shape: Shape
    bound: int


@dataclasses.dataclass(frozen=True)
class Bools:
    """Truth values, of which the first is True."""

    shape: Shape


@dataclasses.dataclass(frozen=True)
class Positive:
    """Numbers from 0.5 to 1.5."""

    shape: Shape


@dataclasses.dataclass(frozen=True)
class Row:
    """One operator.

    Attributes:
        name: Its name, and what is special about the call.
        function: Takes tensors and returns one or several.
        shapes: Each a tuple of what it takes: a shape stands for normally distributed numbers.
        quick: Whether it belongs to the tests that always run.
        fixed: Whether it takes one size of its first dimension alone.
        widened: Whether torch refuses it in 16 bit, as an operator that the policy widens. Models
            have it after the passes, and so has the survey.
    """

    name: str
    function: Callable[..., Any]
    shapes: tuple[tuple[Any, ...], ...]
    quick: bool = False
    fixed: bool = False
    widened: bool = False


def row(
    name: str,
    function: Callable[..., Any],
    *shapes: Any,
    quick: bool = False,
    fixed: bool = False,
    widened: bool = False,
) -> Row:
    """A row; each of ``shapes`` is a tuple of inputs."""
    return Row(name, function, shapes, quick, fixed, widened)


def recurrent(kind: type[nn.Module], **options: Any) -> Callable[..., Any]:
    """A recurrent layer of size 3 to 4, whose weights come from one tensor."""

    layer: Any = kind(3, 4, **options)
    generator = torch.Generator().manual_seed(0)
    weights = {
        n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in layer.named_parameters()
    }

    def run(x: Tensor, factor: Tensor) -> Tensor:
        given = {n: w.to(x.dtype) * factor for n, w in weights.items()}
        return torch.func.functional_call(layer, given, (x,))[0]

    return run
