"""What a model of the zoo is, and where to find each one."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .values import float_tensors

FAMILIES = (
    "classics",
    "sequences",
    "structures",
    "hf",
    "hf_vision",
    "timm_models",
    "hard",
    "hf_hard",
)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def call(*args: Any, **kwargs: Any) -> Call:
    """Return the arguments as a `Call`."""
    return Call(args, kwargs)


def training_loss(outputs: Any) -> Tensor:
    """Return the model's own loss, or else the sum of mean squares of its float outputs.

    The mean squares are taken in float32, outside any autocast region, so that the same outputs
    always give the same loss.
    """
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(own, Tensor) and own.requires_grad:
        return own if own.ndim == 0 else own.float().mean()
    terms = [t.float().square().mean() for t in float_tensors(outputs) if t.requires_grad]
    if not terms:
        raise ValueError("no output of the model depends on anything that requires a gradient")
    return torch.stack(terms).sum()


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, how to call it, and what is known about it.

    ``model`` and ``inputs`` are called under a fixed seed, several times, and must give the same
    values each time. ``inputs`` takes the batch size.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], Call]
    family: str = ""
    loss: Callable[[Any], Tensor] = training_loss
    train: bool = True
    batch: int = 2
    # Batch size of the second call; None where the model takes one size only, in which case the
    # second call brings other values of the same shapes.
    second_batch: int | None = 3
    tags: frozenset[str] = frozenset()
    notes: str = ""
    # A written cause for a difference that is not mpgraph's to remove. Such a case must be close.
    known_difference: str = ""

    @property
    def is_quick(self) -> bool:
        """Whether the case belongs to the subset that every test run includes."""
        return "quick" in self.tags


def quick(case: Case) -> Case:
    """Return the case as a member of the quick subset."""
    return dataclasses.replace(case, tags=case.tags | {"quick"})


def family_cases(family: str) -> tuple[Case, ...]:
    """Return the cases of one file, each with the family's name."""
    cases: Sequence[Case] = importlib.import_module(f".{family}", __package__).CASES
    extra = frozenset({"hard"}) if family.endswith("hard") else frozenset()
    return tuple(dataclasses.replace(c, family=family, tags=c.tags | extra) for c in cases)


def all_cases() -> dict[str, Case]:
    """Return every case by name; two of one name are a mistake here."""
    cases = [case for family in FAMILIES for case in family_cases(family)]
    by_name = {case.name: case for case in cases}
    if len(by_name) != len(cases):
        names = [case.name for case in cases]
        raise ValueError(f"names used twice: {sorted({n for n in names if names.count(n) > 1})}")
    return by_name


def select(which: str) -> dict[str, Case]:
    """Return the cases of a set (``quick``, ``public``, ``hard``, ``all``) or of a name glob."""
    sets: dict[str, Callable[[Case], bool]] = {
        "all": lambda c: True,
        "quick": lambda c: c.is_quick,
        "hard": lambda c: "hard" in c.tags,
        "public": lambda c: "hard" not in c.tags,
    }
    chosen = sets.get(which, lambda c: fnmatch.fnmatchcase(c.name, which))
    found = {name: case for name, case in all_cases().items() if chosen(case)}
    if not found:
        raise KeyError(f"no case in set {which!r}, and no case is named so")
    return found
