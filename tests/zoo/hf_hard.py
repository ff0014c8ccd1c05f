"""Hugging Face models that a plain trace gets wrong, or that branch on their data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .hf import (
    BERT_LIKE,
    LLAMA_LIKE,
    SEQ2SEQ,
    WORDS,
    answer_span,
    hf,
    language,
    make,
    padding_mask,
    translation,
    unpadded_language,
    words,
)
from .hf_vision import boxes, pictures
from .registry import Call, Case, call


def detection(batch: int) -> Call:
    """Return images, their pixel masks and boxes to be matched."""
    mask = torch.ones(batch, 64, 64, dtype=torch.long)
    return call(pixel_values=pictures(batch, 64), pixel_mask=mask, labels=boxes(batch))


def waveforms(batch: int) -> Call:
    """Return raw audio and a transcript for CTC."""
    return call(input_values=torch.randn(batch, 800), labels=torch.randint(1, 20, (batch, 4)))


def tiled_images_in_text(batch: int) -> Call:
    """Return texts with one image of 4 merged patches each, as Qwen2-VL takes them."""
    tokens = words(batch, 12).clamp(max=90)
    tokens[:, 1] = 92
    tokens[:, 2:6] = 95
    grid = torch.tensor([[1, 4, 4]]).expand(batch, -1).clone()
    return call(
        input_ids=tokens,
        attention_mask=padding_mask(batch, 12),
        pixel_values=torch.randn(batch * 16, 3 * 2 * 4 * 4),
        image_grid_thw=grid,
        mm_token_type_ids=(tokens == 95).int(),
        labels=tokens.masked_fill(tokens == 95, -100),
    )


_RESNET: dict[str, Any] = {
    "model_type": "resnet", "embedding_size": 8, "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16], "out_features": ["stage4"],
}  # fmt: skip
_DETR = {
    "backbone_config": _RESNET, "use_timm_backbone": False, "backbone": None, "num_queries": 5,
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
_WAV2VEC2 = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "conv_dim": [8, 8], "conv_stride": [8, 4], "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "mask_time_length": 2,
    "num_conv_pos_embedding_groups": 2, "ctc_loss_reduction": "mean", "mask_time_prob": 0.3,
}  # fmt: skip
_QWEN2_VL = {
    "text_config": {**LLAMA_LIKE, "model_type": "qwen2_vl_text",
                    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1],
                                        "rope_theta": 1e4}},
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4,
                      "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2},
    "image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}  # fmt: skip
_QWEN3_NEXT = {
    **LLAMA_LIKE, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_PROPHETNET = {
    "vocab_size": WORDS, "hidden_size": 32, "num_encoder_layers": 1, "num_decoder_layers": 1,
    "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip
_BLOOM = {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}


def _longformer_inputs(batch: int) -> Call:
    return call(**language(batch).kwargs, global_attention_mask=torch.eye(batch, 12).long())


def _checkpointed_llama() -> nn.Module:
    model = make("LlamaConfig", "LlamaForCausalLM", **LLAMA_LIKE)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model


CASES: tuple[Case, ...] = (
    hf("bloom", "BloomConfig", "BloomForCausalLM", language, _BLOOM,
       notes="gelu is a custom autograd.Function"),
    hf("yoso", "YosoConfig", "YosoForMaskedLM", unpadded_language,
       {**BERT_LIKE, "use_expectation": True}, notes="attention is a custom autograd.Function"),
    hf("phimoe", "PhimoeConfig", "PhimoeForCausalLM", language,
       {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2},
       notes="routing is a custom autograd.Function"),
    hf("qwen3-next", "Qwen3NextConfig", "Qwen3NextForCausalLM", language, _QWEN3_NEXT,
       known_difference="transformers solves its triangular systems in a loop while exported, "
       "and with torch.linalg.solve_triangular otherwise"),
    hf("detr", "DetrConfig", "DetrForObjectDetection", detection, _DETR,
       notes="the loss needs scipy for its matching; without it eager fails"),
    hf("detr-no-labels", "DetrConfig", "DetrForObjectDetection",
       lambda b: call(pixel_values=pictures(b, 64)), _DETR),
    hf("wav2vec2", "Wav2Vec2Config", "Wav2Vec2ForCTC", waveforms, _WAV2VEC2,
       notes="CTC loss; SpecAugment and LayerDrop draw from numpy"),
    hf("qwen2-vl", "Qwen2VLConfig", "Qwen2VLForConditionalGeneration", tiled_images_in_text,
       _QWEN2_VL, notes="splits by values"),
    hf("longformer", "LongformerConfig", "LongformerForMaskedLM", _longformer_inputs,
       {**BERT_LIKE, "attention_window": 4, "pad_token_id": 1}, notes="branches on its masks"),
    hf("prophetnet", "ProphetNetConfig", "ProphetNetForConditionalGeneration", translation,
       _PROPHETNET),
    hf("deberta", "DebertaConfig", "DebertaForQuestionAnswering", answer_span,
       {**BERT_LIKE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
       notes="torch.jit.script functions"),
    hf("bart-layerdrop", "BartConfig", "BartForConditionalGeneration", translation,
       {**SEQ2SEQ, "encoder_layers": 5, "decoder_layers": 5, "encoder_layerdrop": 0.4,
        "decoder_layerdrop": 0.4}),
    Case("hf-llama-checkpoint", _checkpointed_llama, language,
         notes="every layer recomputed, without the reentrant engine"),
)  # fmt: skip
