"""Any configuration of transformers, made small by the names of its fields.

Sizes that must agree with each other share a rule, so they still agree afterwards: everything
called a hidden size becomes the same hidden size, in nested configurations, too. What no rule
names stays as it is. A field that the class derives from others when it is left alone is left
alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Size:
    """How small to make a configuration."""

    hidden: int = 64
    heads: int = 4
    layers: int = 2
    image: int = 64
    patch: int = 8
    # Lists of widths, one per stage, keep their ratios and start here; 0 leaves them alone.
    stage: int = 16
    # Leave widths of any kind alone: for models whose widths are tied by arithmetic of their own.
    keeps_widths: bool = False

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.hidden // self.heads


# What is tried, in order: the last rows give up smallness for agreement.
SIZES = (
    Size(),
    Size(stage=0),
    Size(layers=4),
    Size(layers=12),
    Size(hidden=128, heads=8, layers=2, image=128, patch=16, stage=32),
    Size(keeps_widths=True, image=64, patch=16),
    Size(keeps_widths=True, image=224, patch=16, layers=12),
)

WORDS = 160
# Special tokens of a shrunk vocabulary, by what their field's name holds.
_TOKENS = {
    "pad": 0, "bos": 1, "eos": 2, "sep": 3, "cls": 4, "mask": 5, "unk": 6, "decoder_start": 7,
    "forced": 8,
    "vision_start": 140, "vision_end": 141, "image_start": 142, "image_end": 143, "boi": 144,
    "eoi": 145, "audio_start": 146, "audio_end": 147, "boa": 148, "eoa": 149,
    "video_start": 150, "video_end": 151, "image": 155, "video": 156, "audio": 157,
}  # fmt: skip

# Rotary positions in three parts; the sizes of the parts are often in the model's code.
_MULTIMODAL_ROPE = re.compile("vl|glm4v|glm46v|glm_ocr|glm_image|omni")

Shrink = Callable[[int, Size], int]


def _at_most(limit: int) -> Shrink:
    return lambda value, size: min(value, limit)


# The first pattern that matches the whole field name decides. `(?:.*_)?` stands for any prefix.
_WIDTHS: tuple[tuple[str, Shrink], ...] = (
    (r"rotary_dim", lambda value, size: min(value, size.head_dim)),
    # Their heads span twice the hidden size.
    (r"mamba_d_ssm", lambda value, size: 2 * size.hidden),
    (r"mamba_n_heads|mamba_num_heads", lambda value, size: 2 * size.heads),
    (
        r"(?:.*_)?(?:head_dim|d_head|d_kv|kv_channels|dim_head|head_size|mamba_head_dim)",
        lambda value, size: size.head_dim,
    ),
    (
        r"(?:.*_)?(?:moe_intermediate_size|expert_intermediate_size|experts_intermediate_size)",
        lambda value, size: size.hidden // 2,
    ),
    (
        r"(?:.*_)?(?:intermediate_size|ffn_dim|d_ff|d_inner|n_inner|mlp_dim|ffn_hidden_size"
        r"|intermediate_dim|linear_units|ff_dim)",
        lambda value, size: 2 * size.hidden,
    ),
    (
        r"(?:.*_)?(?:hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|model_dim"
        r"|emb_dim|dim|embedding_dim|projection_dim|proj_dim|output_dim|hidden_size_global"
        r"|codevector_dim|xvector_output_dim|classifier_proj_size|pooler_output_size"
        r"|adapter_out_dim|adapter_in_dim|projection_size|output_proj_dims|feature_size"
        r"|fpn_feature_size|mask_feature_size|width|query_pre_attn_scalar|hidden_channels)",
        lambda value, size: size.hidden,
    ),
    (r"(?:.*_)?(?:lora_rank|laurel_rank)", lambda value, size: size.hidden // 4),
    (r"(?:.*_)?(?:d_state|state_size)", _at_most(16)),
    (
        r"(?:.*_)?(?:num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num"
        r"|num_key_heads)",
        lambda value, size: min(value, size.heads // 2),
    ),
    (
        r"(?:.*_)?(?:num_attention_heads|n_heads?|num_heads|attention_heads|index_n_heads"
        r"|linear_num_value_heads|resampler_heads)",
        lambda value, size: min(value, size.heads),
    ),
    (r"upsample_groups", lambda value, size: size.hidden),
    (r"num_conv_pos_embedding_groups|num_codevector_groups", _at_most(2)),
    (r"(?:.*_)?(?:num_pos_feats)", lambda value, size: size.hidden // 2),
    (r"coordinate_size|shape_size", lambda value, size: size.hidden // 6),
)

# Layers of two kinds, where the class has a longer list of them in code only.
_LAYER_KINDS = {
    "granitemoehybrid": ["mamba", "attention"],
    "lfm2_moe": ["conv", "full_attention"],
    "gpt_neo": [[["global", "local"], 1]],
}
# What a class leaves undecided and its model cannot do without.
_UNDECIDED = {
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "top_k_experts": 2,
    "prediction_length": 8,
    "image_token_index": 155,
    "image_token_id": 155,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "vocab_size": 160,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "attn_layer_indices": [1],
    "default_language": "en_XX",
}

_COUNTS: tuple[tuple[str, Shrink], ...] = (
    (
        r"(?:.*_)?(?:num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers"
        r"|num_encoder_layers|num_decoder_layers|depth|num_blocks|layers|num_hidden_blocks"
        r"|num_adapter_layers|num_attn_blocks|num_encoder_blocks|num_mtp_layers)",
        lambda value, size: min(value, size.layers),
    ),
    (r"(?:.*_)?num_residual_layers|num_lstm_layers|first_k_dense_replace", _at_most(1)),
    (r"(?:.*_)?vocab_size|vocab_size_per_layer_input", _at_most(WORDS)),
    (
        r"(?:.*_)?(?:n_positions|max_position_embeddings|max_target_positions|n_ctx|max_seq_len"
        r"|max_length|max_relative_positions|num_position_embeddings|context_length)",
        _at_most(256),
    ),
    (r"max_2d_position_embeddings|position_embedding_size", _at_most(1024)),
    (r"max_source_positions", _at_most(64)),
    (r"(?:.*_)?(?:num_experts|num_local_experts|n_routed_experts|moe_num_experts)", _at_most(4)),
    (r"(?:.*_)?(?:num_experts_per_tok|moe_topk|top_k|moe_k|moe_top_k)", _at_most(2)),
    (r"n_group|topk_group|num_expert_group|mamba_n_groups|n_groups", _at_most(1)),
    (r"(?:.*_)?(?:num_queries|num_query_tokens|num_detection_tokens)", _at_most(8)),
    (r"codebook_size|num_embeddings|num_embeds", _at_most(64)),
    (
        r"sliding_window|sliding_window_size|local_attention|attention_window|block_size",
        _at_most(8),
    ),
    (r"(?:.*_)?chunk_size", lambda value, size: min(value, 8) if value > 0 else value),
    (r"num_frames", _at_most(4)),
    (r"index_topk", _at_most(8)),
    (r"(?:pretrain_)?image_size|input_size|img_size|max_img_size|crop_size",
     lambda value, size: size.image if value > 64 else value),
    (r"patch_size", lambda value, size: size.patch if value > size.patch else value),
    (r"train_num_points|num_denoising", _at_most(16)),
    (r"num_kv_shared_layers|max_window_layers|num_dense_layers", _at_most(1)),
)  # fmt: skip

_STAGE_WIDTHS = re.compile(
    r"(?:.*_)?(?:hidden_sizes|embed_dims?|dims|conv_dim|tdnn_dim|neck_hidden_sizes"
    r"|embed_dim_per_stage|downsample_channels)"
)
_STAGE_DEPTHS = re.compile(r"depths|num_block_repeats|blocks_per_stage")
_KINDS_OF_LAYER = re.compile(r".*layer_types|layers_block_type|indexer_types")


def shrunk(config_class: type, size: Size, **fixed: Any) -> Any:
    """Return a small configuration of the class.

    ``fixed`` overrides what the rules would give. Raises whatever the class raises where the
    result contradicts itself.
    """
    return config_class(**{**dict(_overrides(config_class, config_class(), size)), **fixed})


def _overrides(config_class: type, default: Any, size: Size) -> Iterator[tuple[str, Any]]:
    from transformers import PreTrainedConfig

    for field in dataclasses.fields(config_class):
        value = _value(default, field.name)
        if isinstance(value, PreTrainedConfig) and value.model_type == "timm_backbone":
            yield field.name, _resnet(len(value.out_indices or [4]))
        elif isinstance(value, PreTrainedConfig):
            yield field.name, _nested(value, size)
        elif field.name == "rope_parameters" and isinstance(value, dict):
            if "mrope_section" in value or _MULTIMODAL_ROPE.search(default.model_type):
                yield field.name, {**value, "mrope_section": _sections(size)}
        elif field.name in ("layer_types", "attention_types") and (
            default.model_type in _LAYER_KINDS
        ):
            yield field.name, _LAYER_KINDS[default.model_type]
        elif value is None and field.name in _UNDECIDED:
            yield field.name, _UNDECIDED[field.name]
        elif not _is_derived(field) or _KINDS_OF_LAYER.fullmatch(field.name):
            small = _agreeing(default, field.name, size) or _small(field.name, value, size)
            if small is not None and small != value:
                yield field.name, small


def _agreeing(default: Any, name: str, size: Size) -> int | None:
    """Return the value of a field whose rule depends on another field, or None."""
    if size.keeps_widths:
        return None
    if name == "num_key_value_heads" and _value(default, name) == _value(
        default, "num_attention_heads"
    ):
        return size.heads
    if name == "num_heads" and hasattr(default, "state_size") and hasattr(default, "expand"):
        return int(default.expand) * size.heads
    return None


def _nested(value: Any, size: Size) -> Any:
    """Return a nested configuration made small; a backbone's outputs stay as many as they were."""
    small = dict(_overrides(type(value), value, size))
    made = type(value)(**small)
    outputs = _value(value, "out_features")
    if not outputs:
        return made
    if not set(outputs) <= set(made.stage_names):
        outputs = made.stage_names[-len(outputs) :]
    return type(value)(**small, out_features=list(outputs))


def _resnet(outputs: int) -> Any:
    """Return a small ResNet in place of a backbone that only timm's own hub could name."""
    from transformers import ResNetConfig

    stages = [f"stage{i}" for i in range(5 - outputs, 5)]
    sizes: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 16, 32, 32]}
    sizes |= {"depths": [1, 1, 1, 1], "out_features": stages}
    return ResNetConfig(**sizes)


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a value that differs from layer to layer has no single answer
        return None


def _is_derived(field: dataclasses.Field[Any]) -> bool:
    return field.default is None and not field.name.endswith(("_id", "_index"))


def _small(name: str, value: Any, size: Size) -> Any:
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return _small_integer(name, value, size)
    if isinstance(value, list | tuple) and value:
        return _small_list(name, value, size)
    return None


def _small_integer(name: str, value: int, size: Size) -> int | None:
    if re.fullmatch(r".*token_(?:id|index)|image_token|blank_token_id", name):
        return _token(name, value)
    rules = _COUNTS if size.keeps_widths else (*_WIDTHS, *_COUNTS)
    for pattern, rule in rules:
        if value > 0 and re.fullmatch(pattern, name):
            return rule(value, size)
    return None


def _token(name: str, value: int) -> int | None:
    if 0 <= value < 130:
        return None
    kinds = sorted((k for k in _TOKENS if k in name), key=len)
    return _TOKENS[kinds[-1]] if kinds else WORDS - 1


def _small_list(name: str, values: Any, size: Size) -> Any:
    kind = type(values)
    if name in ("image_size", "patch_size") and all(isinstance(v, int) for v in values):
        return kind(_small_integer(name, v, size) for v in values)
    if name.endswith("token_id") and all(isinstance(v, int) for v in values):
        return kind([_TOKENS["eos"]])
    if _KINDS_OF_LAYER.fullmatch(name):
        distinct = list(dict.fromkeys(values))
        return kind((distinct * size.layers)[: size.layers])
    if _STAGE_DEPTHS.fullmatch(name) and all(isinstance(v, int) for v in values):
        return kind(min(v, 1) for v in values)
    if name == "decoder_in_channels" and not size.keeps_widths:
        return kind([size.hidden] * len(values))
    if re.fullmatch(r"(?:.*_)?(?:num_)?(?:attention_)?heads(?:_per_stage)?", name) and size.stage:
        return kind(max(v // min(values), 1) for v in values)
    if _STAGE_WIDTHS.fullmatch(name) and not size.keeps_widths and size.stage:
        if all(isinstance(v, int) for v in values):
            smallest = min(values)
            return kind(max(size.stage * v // smallest // 8 * 8, 8) for v in values)
    if name in ("global_attn_indexes", "deepstack_visual_indexes", "fullatt_block_indexes"):
        return kind([size.layers - 1] * 1)
    return None


def _sections(size: Size) -> list[int]:
    """Share half a head's width among time, height and width."""
    half = 64 if size.keeps_widths else size.head_dim // 2
    rest = half // 4
    return [half - 2 * rest, rest, rest]
