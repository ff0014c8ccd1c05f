"""Arguments for any model of transformers, from the names in its forward's signature."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .registry import Call

LENGTH = 16
FIRST_WORD, LAST_WORD = 9, 130


@dataclasses.dataclass(frozen=True)
class InputKind:
    """Which arguments to pass, and in which of the layouts in use."""

    text: bool = True
    image: str = ""  # square, clip, clip-channels, crops, pair, patches, tiles, rows
    audio: str = ""  # wave, wave-channel, mel-first, frames-first, mel-image
    labels: bool = True
    # Placeholder tokens in each text for its image or audio.
    media_tokens: int = 0

    def __str__(self) -> str:
        parts = ["text" if self.text else "", self.image, self.audio]
        parts += ["labels" if self.labels else ""]
        return "+".join(part for part in parts if part)


def parameters(model_class: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class's forward, without self."""
    found = dict(inspect.signature(model_class.forward).parameters)
    found.pop("self", None)
    return found


def input_kinds(model_class: Any, config: Any) -> Iterator[InputKind]:
    """Yield the kinds of call worth trying, the fullest first."""
    names = parameters(model_class)
    texts = [True] if "input_ids" in names else [False]
    images, audios = _images(names, config), _audios(names)
    labels = [True, False] if names.keys() & {"labels", "start_positions"} else [False]
    for choice in itertools.product(labels, texts, images, audios):
        kind = InputKind(labels=choice[0], text=choice[1], image=choice[2], audio=choice[3])
        if kind.text or kind.image or kind.audio or not (images[0] or audios[0]):
            yield kind
    if "input_ids" in names and (images[0] or audios[0]):
        # A model of several modalities that takes one at a time.
        for image, audio in ((images[0], ""), ("", audios[0])):
            if image or audio:
                yield InputKind(text=False, image=image, audio=audio, labels=False)


def _images(names: Any, config: Any) -> list[str]:
    if not names.keys() & {"pixel_values", "pixel_values_videos", "image", "images"}:
        return ["patches", "tiles"] if "grid_thw" in names else [""]
    layouts = ["square"]
    if names.keys() & {"image_grid_thw", "grid_thw", "image_grid_hws", "spatial_shapes"}:
        layouts = ["patches", "tiles", "rows", "square"]
    elif _find(config, "num_frames", "tubelet_size"):
        layouts = ["clip", "clip-channels", "square"]
    elif hasattr(config, "keypoint_detector_config") or "loftr" in config.model_type:
        layouts = ["pair"]
    return [*layouts, "crops", ""] if "input_ids" in names else layouts


def _audios(names: Any) -> list[str]:
    if "input_features" in names:
        layouts = ["mel-first", "frames-first", "mel-image"]
    elif "input_values" in names:
        layouts = ["wave", "frames-first", "wave-channel", "mel-image"]
    elif names.keys() & {"audio_values", "audio_features", "input_audio_embeds"}:
        layouts = ["frames-first", "wave", "wave-channel"]
    else:
        return [""]
    return [*layouts, ""] if "input_ids" in names else layouts


_MISMATCH = (
    r"tokens:? (?P<tokens>\d+),? (?:length|features):? (?P<features>\d+)",
    r"(?P<tokens>\d+) (?:image|audio)? ?tokens.* (?P<features>\d+) (?:image|audio)? ?features",
)


def corrected(kind: InputKind, failure: Exception, batch: int) -> InputKind | None:
    """Return the kind with as many placeholder tokens as the model says it wants, or None."""
    for pattern in _MISMATCH:
        if match := re.search(pattern, str(failure)):
            wanted = int(match["features"]) // batch
            if wanted and wanted != kind.media_tokens:
                return dataclasses.replace(kind, media_tokens=wanted)
    return None


def make_inputs(model_class: Any, config: Any, kind: InputKind, batch: int) -> Call:
    """Return arguments of one kind for a batch."""
    return _Inputs(model_class, config, kind, batch).call()


def _find(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first of the names that the configuration or a nested one has."""
    from transformers import PreTrainedConfig

    nested = [v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]
    for name in names:
        for place in (config, *nested):
            value = vars(place).get(name)
            if value is not None and not isinstance(value, bool):
                return value
    for place in nested:
        value = _find(place, *names)
        if value is not None:
            return value
    return default


def _scalar(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


_MEL_NAMES = (
    "num_mel_bins",
    "input_feat_per_channel",
    "feature_size",
    "input_dim",
    "mel_dim",
    "feature_projection_input_dim",
)


def padded_mask(tokens: torch.Tensor) -> torch.Tensor:
    """Return a mask under which the last text of the batch ends two tokens early.

    transformers drops a mask of ones only, in eager mode and not when it is traced.
    """
    mask = torch.ones(tokens.shape, dtype=torch.long)
    mask[-1, -2:] = 0
    return mask


class _Inputs:
    """Builds arguments by name; one method per group of names."""

    def __init__(self, model_class: Any, config: Any, kind: InputKind, batch: int) -> None:
        self.names = parameters(model_class)
        self.task = model_class.__name__
        self.config, self.kind, self.batch = config, kind, batch
        self.length = LENGTH + kind.media_tokens

    def call(self) -> Call:
        given: dict[str, Any] = {}
        if self.kind.text:
            given |= self.text()
        if self.kind.image:
            given |= self.image()
        if self.kind.audio:
            given |= self.audio()
        if "past_values" in self.names:
            given |= self.series()
        if self.kind.labels:
            given |= self.labels(given.get("input_ids"))
        for name, parameter in self.names.items():
            is_required = parameter.default is parameter.empty
            if is_required and name not in given and parameter.kind not in (2, 4):
                given[name] = self.required(name)
        return Call((), {name: v for name, v in given.items() if name in self.names})

    def words(self, length: int | None = None) -> Tensor:
        vocabulary = min(_scalar(_find(self.config, "vocab_size", default=LAST_WORD)), LAST_WORD)
        low = min(FIRST_WORD, vocabulary - 1)
        return torch.randint(low, vocabulary, (self.batch, length or self.length))

    def text(self) -> dict[str, Any]:
        ids = self.words()
        if self.kind.media_tokens:
            ids[:, 1 : 1 + self.kind.media_tokens] = self.media_token()
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": padded_mask(ids)}
        if "decoder_input_ids" in self.names and not self.kind.labels:
            given["decoder_input_ids"] = self.words(LENGTH)
        if "bbox" in self.names:
            given["bbox"] = torch.randint(0, 500, (self.batch, self.length, 4)).sort(-1).values
        if "mm_token_type_ids" in self.names:
            given["mm_token_type_ids"] = (ids == self.media_token()).int()
        if "token_type_ids" in self.names and self.kind.media_tokens:
            given["token_type_ids"] = torch.zeros_like(ids)
        return given

    def media_token(self) -> int:
        kinds = ("image", "video") if self.kind.image else ("audio", "speech")
        endings = ("token_id", "token_index", "token")
        names = [f"{kind}_{ending}" for kind in kinds for ending in endings]
        return _scalar(_find(self.config, *names, default=LAST_WORD))

    def image(self) -> dict[str, Any]:
        size = _scalar(_find(self.config, "image_size", "input_size", "img_size", default=64))
        channels = _scalar(_find(self.config, "num_channels", "in_channels", "in_chans", default=3))
        if self.kind.image in ("patches", "tiles", "rows"):
            return self.patches(channels)
        frames = _scalar(_find(self.config, "num_frames", default=4))
        shape = {
            "square": (channels, size, size),
            "clip": (frames, channels, size, size),
            "clip-channels": (channels, frames, size, size),
            "crops": (1, channels, size, size),
            "pair": (2, channels, size, size),
        }[self.kind.image]
        pixels = torch.randn(self.batch, *shape)
        given: dict[str, Any] = {"pixel_values": pixels, "image": pixels, "images": pixels}
        if "pixel_values" not in self.names:
            given["pixel_values_videos"] = pixels
        given["image_sizes"] = torch.full((self.batch, 2), size)
        if "bool_masked_pos" in self.names:
            given |= self.hidden_patches(size, frames)
        return given

    def hidden_patches(self, size: int, frames: int) -> dict[str, Tensor]:
        patch = _scalar(_find(self.config, "patch_size", default=8))
        count = (size // patch) ** 2
        if self.kind.image.startswith("clip"):
            count *= frames // _scalar(_find(self.config, "tubelet_size", default=1))
        hidden = torch.zeros(self.batch, count, dtype=torch.bool)
        hidden[:, ::2] = True
        return {"bool_masked_pos": hidden}

    def patches(self, channels: int) -> dict[str, Any]:
        """Return images cut into patches beforehand, four by four of them, as Qwen2-VL's are."""
        patch = _scalar(_find(self.config, "patch_size", default=8))
        depth = _scalar(_find(self.config, "temporal_patch_size", default=1))
        grid = torch.tensor([[1, 4, 4]]).repeat(self.batch, 1)
        flat = self.kind.image == "patches"
        shape = (channels * depth * patch * patch,) if flat else (channels, patch, patch)
        pixels = torch.randn(16 * self.batch, *shape)
        if self.kind.image == "rows":
            pixels = pixels.view(self.batch, 16, -1)
        return {
            "pixel_values": pixels,
            "hidden_states": pixels,
            "image_grid_thw": grid,
            "grid_thw": grid,
            "image_grid_hws": grid[:, 1:],
            "spatial_shapes": grid[:, 1:],
        }

    def audio(self) -> dict[str, Any]:
        mel = _scalar(_find(self.config, *_MEL_NAMES, default=80))
        positions = _find(self.config, "max_source_positions")
        frames = (
            2 * _scalar(positions)
            if positions
            else _scalar(_find(self.config, "max_length", default=64))
        )
        shape = {
            "wave": (4000,),
            "wave-channel": (1, 4000),
            "mel-first": (mel, frames),
            "frames-first": (frames, mel),
            "mel-image": (1, frames, mel),
        }[self.kind.audio]
        sound = torch.randn(self.batch, *shape)
        given: dict[str, Any] = dict.fromkeys(
            ("input_features", "input_values", "audio_values", "audio_features"), sound
        )
        mask = torch.ones(self.batch, frames, dtype=torch.long)
        given |= {"input_features_mask": mask, "feature_attention_mask": mask}
        if not self.kind.text and self.kind.labels is False and "decoder_input_ids" in self.names:
            given["decoder_input_ids"] = self.words(LENGTH)
        return given

    def series(self) -> dict[str, Any]:
        past = _scalar(_find(self.config, "context_length", default=32))
        lags = _find(self.config, "lags_sequence", default=[0])
        channels = _scalar(_find(self.config, "num_input_channels", "input_size", default=1))
        future = _scalar(_find(self.config, "prediction_length", default=8) or 8)
        past += max(lags) if isinstance(lags, list | tuple) else 0
        is_flat = channels == 1 and not hasattr(self.config, "num_input_channels")
        shape = (self.batch, past) if is_flat else (self.batch, past, channels)
        ahead = (self.batch, future, *shape[2:])
        given = {"past_values": torch.randn(shape), "future_values": torch.randn(ahead)}
        given["past_observed_mask"] = torch.ones(shape)
        times = _scalar(_find(self.config, "num_time_features", default=1))
        given["past_time_features"] = torch.randn(self.batch, past, times)
        given["future_time_features"] = torch.randn(self.batch, future, times)
        return given

    def labels(self, ids: Tensor | None) -> dict[str, Any]:
        classes = max(int(getattr(self.config, "num_labels", 2) or 2), 1)
        if re.search("QuestionAnswering", self.task):
            start, end = torch.randint(0, LENGTH, (2, self.batch))
            return {"start_positions": start, "end_positions": end}
        if re.search("CTC|TDT|RNNT", self.task):
            return {"labels": torch.randint(FIRST_WORD, 20, (self.batch, 3))}
        if re.search("(Sequence|Image|Video|Audio)Classification|XVector", self.task):
            return {"labels": torch.randint(0, classes, (self.batch,))}
        if "TokenClassification" in self.task and ids is not None:
            return {"labels": torch.randint(0, classes, ids.shape)}
        if "SemanticSegmentation" in self.task:
            size = _scalar(_find(self.config, "image_size", default=64))
            return {"labels": torch.randint(0, classes, (self.batch, size, size))}
        if ids is not None and "decoder_input_ids" not in self.names:
            return {"labels": ids.masked_fill(ids == self.media_token(), -100)}
        return {"labels": self.words(LENGTH)}

    def required(self, name: str) -> Any:
        """Return a value for an argument that has no default and that nothing above made."""
        width = _scalar(_find(self.config, "hidden_size", "d_model", "embed_dim", default=64))
        by_name: dict[str, Any] = {
            "inputs_embeds": torch.randn(self.batch, LENGTH, width),
            "hidden_states": torch.randn(self.batch, LENGTH, width),
            "query_embeds": torch.randn(self.batch, 8, width),
            "inputs": self.words(),
            "qformer_input_ids": self.words(),
            "attention_mask": padded_mask(torch.empty(self.batch, LENGTH)),
            "pixel_mask": torch.ones(self.batch, 64, 64, dtype=torch.long),
        }
        if name not in by_name:
            raise ValueError(f"no idea what to pass for {name!r}")
        return by_name[name]
