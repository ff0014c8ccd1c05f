"""Every model type of transformers, as tiny as a general rule can make it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .hf_inputs import InputKind, corrected, input_kinds, make_inputs
from .registry import Call, Case
from .shrink import SIZES, Size, shrunk

os.environ["HF_HUB_OFFLINE"] = "1"

# Which head to take: the first of a type's heads in this order gives a loss most readily.
TASKS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ", "CTC", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING", "SEMANTIC_SEGMENTATION", "", "BACKBONE", "DEPTH_ESTIMATION",
    "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION", "TIME_SERIES_PREDICTION", "PRETRAINING",
)  # fmt: skip
MAX_PARAMETERS = 60_000_000
MAX_CLASSES = 4


def model_types() -> list[str]:
    """Return the model types for which transformers names a model class."""
    return [model_type for model_type in _config_names() if model_classes(model_type)]


def _config_names() -> dict[str, str]:
    from transformers.models.auto import configuration_auto

    return dict(vars(configuration_auto)["CONFIG_MAPPING_NAMES"])


@functools.cache
def _mappings() -> dict[str, dict[str, Any]]:
    from transformers.models.auto import modeling_auto

    found = {}
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES"):
            task = name.removeprefix("MODEL_FOR_").removeprefix("MODEL_")
            found[task.removesuffix("MAPPING_NAMES").rstrip("_")] = dict(mapping)
    return found


def model_classes(model_type: str) -> list[str]:
    """Return the names of a type's model classes, the readiest to train first."""
    mappings = _mappings()
    tasks = [*TASKS, *(task for task in mappings if task not in TASKS)]
    names: list[str] = []
    for task in tasks:
        entry = mappings.get(task, {}).get(model_type, ())
        names += [entry] if isinstance(entry, str) else list(entry)
    return list(dict.fromkeys(names))


def candidates(model_type: str) -> Iterator[Case]:
    """Yield ways to build and call a model of the type, the most wanted first.

    Each has run one forward in float32. Where none did, the one case there is raises the last
    failure.
    """
    failures: list[Exception] = [ValueError("no size of the configuration gives a model")]
    for class_name, size, model in _buildable(model_type, failures):
        for kind in _callable_kinds(model, failures):
            yield Case(
                f"hf:{model_type}",
                functools.partial(build, model_type, class_name, size),
                functools.partial(make_inputs, type(model), model.config, kind),
                family="hf-sweep",
                notes=f"{class_name} of {kind}",
            )
            failures.clear()
    if failures:
        yield Case(f"hf:{model_type}", functools.partial(_raise, failures[-1]), lambda b: Call())


def _raise(failure: Exception) -> Any:
    raise failure


def _buildable(model_type: str, failures: list[Exception]) -> Iterator[tuple[str, Size, Any]]:
    for class_name in model_classes(model_type)[:MAX_CLASSES]:
        for size in SIZES:
            try:
                with torch.device("meta"):
                    count = sum(p.numel() for p in build(model_type, class_name, size).parameters())
                if count > MAX_PARAMETERS:
                    raise ValueError(f"{class_name} keeps {count:,} parameters")
                yield class_name, size, build(model_type, class_name, size)
            except Exception as failure:  # these sizes do not go together in this model
                failures.append(failure)


def _callable_kinds(model: Any, failures: list[Exception]) -> Iterator[InputKind]:
    queue = list(input_kinds(type(model), model.config))
    while queue:
        kind: InputKind | None = queue.pop(0)
        assert kind is not None
        try:
            with torch.no_grad():
                call = make_inputs(type(model), model.config, kind, 2)
                model(*call.args, **call.kwargs)
        except Exception as failure:  # the model takes something else
            failures.append(failure)
            kind = corrected(kind, failure, 2)
            queue[:0] = [kind] if kind else []
            continue
        yield kind


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def build(model_type: str, class_name: str, size: Size) -> nn.Module:
    """Return a small model of a class of transformers with random weights."""
    from transformers import CONFIG_MAPPING

    model: nn.Module = _class(class_name)(shrunk(CONFIG_MAPPING[model_type], size))
    return model
