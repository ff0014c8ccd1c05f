"""From a name to the ways of building that model."""

from __future__ import annotations

from collections.abc import Iterator

from . import registry, sweep_hf, sweep_timm
from .registry import Case


def candidates(name: str) -> Iterator[Case]:
    """Yield cases for ``hf:<model type>``, ``timm:<architecture>`` or a case of the registry.

    The first that eager torch can train is the one to check.
    """
    source, _, rest = name.partition(":")
    if source == "hf" and rest:
        yield from sweep_hf.candidates(rest)
    elif source == "timm" and rest:
        yield from sweep_timm.candidates(rest)
    else:
        yield registry.all_cases()[name]


def sweep_names() -> list[str]:
    """Return every name of the sweep: model types of transformers, then families of timm."""
    hf = [f"hf:{model_type}" for model_type in sweep_hf.model_types()]
    return hf + [f"timm:{architecture}" for architecture in sweep_timm.architectures()]
