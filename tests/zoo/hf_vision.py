"""Vision, speech, multimodal and time-series models of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

import torch

from .hf import LENGTH, LLAMA_LIKE, WORDS, hf, padding_mask, words
from .registry import Call, call, quick

VIT_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
CLIP_VISION = VIT_LIKE
IMAGE_TOKEN = 98


def pictures(batch: int, size: int = 32) -> torch.Tensor:
    """Return a batch of square RGB images."""
    return torch.randn(batch, 3, size, size)


def labelled_images(batch: int) -> Call:
    """Return images with one of two classes each."""
    return call(pixel_values=pictures(batch), labels=torch.randint(0, 2, (batch,)))


def large_labelled_images(batch: int) -> Call:
    """Return larger images, for networks that halve them many times."""
    return call(pixel_values=pictures(batch, 64), labels=torch.randint(0, 2, (batch,)))


def segmented_images(batch: int) -> Call:
    """Return images with one of two classes per pixel."""
    return call(pixel_values=pictures(batch, 64), labels=torch.randint(0, 2, (batch, 64, 64)))


def plain_images(batch: int) -> Call:
    """Return images alone."""
    return call(pixel_values=pictures(batch))


def plain_large_images(batch: int) -> Call:
    """Return larger images alone."""
    return call(pixel_values=pictures(batch, 64))


def masked_clips(batch: int) -> Call:
    """Return clips of four frames and which of their patches are hidden."""
    hidden = torch.zeros(batch, 2 * 16, dtype=torch.bool)
    hidden[:, ::2] = True
    return call(pixel_values=torch.randn(batch, 4, 3, 32, 32), bool_masked_pos=hidden)


def captioned_images(batch: int) -> Call:
    """Return pairs of image and text for a contrastive loss."""
    return call(input_ids=words(batch), pixel_values=pictures(batch), return_loss=True)


def images_in_text(batch: int) -> Call:
    """Return texts that hold one image of 16 tokens each, and labels."""
    tokens = words(batch, 16 + LENGTH).clamp(max=IMAGE_TOKEN - 1)
    tokens[:, 1:17] = IMAGE_TOKEN
    labels = tokens.masked_fill(tokens == IMAGE_TOKEN, -100)
    return call(
        input_ids=tokens, pixel_values=pictures(batch), labels=labels,
        attention_mask=padding_mask(batch, 16 + LENGTH),
    )  # fmt: skip


def images_in_unpadded_text(batch: int) -> Call:
    """Return the same with an attention mask that hides nothing."""
    kwargs = dict(images_in_text(batch).kwargs)
    return call(**kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"])})


def images_in_typed_text(batch: int) -> Call:
    """Return the same with token types, as PaliGemma wants when it trains."""
    plain = images_in_text(batch)
    types = (torch.arange(16 + LENGTH) > 20).long().expand(batch, -1).clone()
    return call(**plain.kwargs, token_type_ids=types)


def documents(batch: int) -> Call:
    """Return words with their boxes, a page image, and a label per word."""
    boxes = torch.randint(0, 500, (batch, LENGTH, 4)).sort(-1).values
    return call(
        input_ids=words(batch), bbox=boxes, pixel_values=pictures(batch),
        labels=torch.randint(0, 2, (batch, LENGTH)), attention_mask=padding_mask(batch),
    )  # fmt: skip


def unpadded_documents(batch: int) -> Call:
    """Return the same without an attention mask."""
    kwargs = dict(documents(batch).kwargs)
    return call(**{k: v for k, v in kwargs.items() if k != "attention_mask"})


def boxes(batch: int) -> list[dict[str, torch.Tensor]]:
    """Return two labelled boxes for each image."""
    one = {
        "class_labels": torch.tensor([0, 1]),
        "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.6, 0.2, 0.2]]),
    }
    return [{k: v.clone() for k, v in one.items()} for _ in range(batch)]


def spectrograms(batch: int) -> Call:
    """Return log-mel frames and target tokens."""
    return call(input_features=torch.randn(batch, 16, 60), labels=words(batch))


def series(batch: int) -> Call:
    """Return the past and the future of three channels."""
    past, future = torch.randn(batch, 32, 3), torch.randn(batch, 8, 3)
    return call(past_values=past, future_values=future)


_SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4],
    "window_size": 4,
}  # fmt: skip
_SEGFORMER = {
    "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4],
    "decoder_hidden_size": 16,
}  # fmt: skip
_MASKFORMER_PARTS = {
    "backbone_config": {**_SWIN, "model_type": "swin", "depths": [1, 1, 1, 1], "image_size": 64,
                        "num_heads": [1, 1, 2, 2], "embed_dim": 8,
                        "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    "decoder_config": {"model_type": "detr", "d_model": 32, "decoder_layers": 1,
                       "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "num_queries": 4,
                       "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
    "fpn_feature_size": 32, "mask_feature_size": 32, "num_channels": 3,
}  # fmt: skip
_CLIP_TEXT = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
_WHISPER = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "num_mel_bins": 16, "max_source_positions": 30,
    "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
_GEMMA_TEXT = {**LLAMA_LIKE, "model_type": "gemma", "head_dim": 8}
_SIGLIP = {**VIT_LIKE, "model_type": "siglip_vision_model", "vision_use_head": False}

_LLAVA = {
    "text_config": {**LLAMA_LIKE, "model_type": "llama"},
    "vision_config": {**VIT_LIKE, "model_type": "clip_vision_model"},
    "image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN, "vision_feature_layer": -1,
}  # fmt: skip
_LAYOUT = {
    **_CLIP_TEXT, "coordinate_size": 6, "shape_size": 4, "input_size": 32, "patch_size": 8,
    "max_2d_position_embeddings": 512, "rel_pos_bins": 8, "rel_2d_pos_bins": 8,
}  # fmt: skip
_NO_MASK = (
    "transformers leaves out an attention mask that hides nothing, but not while it is traced: "
    "it would have to read the mask's values"
)

CASES = (
    quick(hf("vit", "ViTConfig", "ViTForImageClassification", labelled_images, VIT_LIKE)),
    hf("deit", "DeiTConfig", "DeiTForImageClassification", labelled_images, VIT_LIKE),
    hf("beit", "BeitConfig", "BeitForImageClassification", labelled_images,
       {**VIT_LIKE, "use_relative_position_bias": True}),
    hf("swin", "SwinConfig", "SwinForImageClassification", labelled_images, _SWIN),
    hf("dinov2", "Dinov2Config", "Dinov2ForImageClassification", labelled_images, VIT_LIKE),
    hf("convnext", "ConvNextConfig", "ConvNextForImageClassification", labelled_images,
       {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32], "drop_path_rate": 0.1}),
    hf("resnet", "ResNetConfig", "ResNetForImageClassification", large_labelled_images,
       {"embedding_size": 8, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]}),
    hf("segformer", "SegformerConfig", "SegformerForSemanticSegmentation", segmented_images,
       _SEGFORMER),
    hf("dpt", "DPTConfig", "DPTForDepthEstimation", plain_images,
       {**VIT_LIKE, "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3], "fusion_hidden_size": 16,
        "neck_hidden_sizes": [8, 8, 16, 16], "is_hybrid": False}),
    hf("maskformer", "MaskFormerConfig", "MaskFormerForInstanceSegmentation", plain_large_images,
       _MASKFORMER_PARTS),
    hf("yolos", "YolosConfig", "YolosForObjectDetection", plain_images,
       {**VIT_LIKE, "image_size": [32, 32], "num_detection_tokens": 5}),
    hf("videomae", "VideoMAEConfig", "VideoMAEForPreTraining", masked_clips,
       {**VIT_LIKE, "num_frames": 4, "tubelet_size": 2, "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 32, "norm_pix_loss": True}),
    hf("clip", "CLIPConfig", "CLIPModel", captioned_images,
       {"text_config": _CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 16}),
    hf("layoutlmv3", "LayoutLMv3Config", "LayoutLMv3ForTokenClassification", documents, _LAYOUT),
    hf("layoutlmv3-unpadded", "LayoutLMv3Config", "LayoutLMv3ForTokenClassification",
       unpadded_documents, _LAYOUT, known_difference=_NO_MASK),
    hf("whisper", "WhisperConfig", "WhisperForConditionalGeneration", spectrograms, _WHISPER),
    hf("patchtsmixer", "PatchTSMixerConfig", "PatchTSMixerForPrediction", series,
       {"context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 8,
        "num_input_channels": 3, "prediction_length": 8, "num_layers": 2}),
    hf("paligemma", "PaliGemmaConfig", "PaliGemmaForConditionalGeneration", images_in_typed_text,
       {"text_config": _GEMMA_TEXT, "vision_config": _SIGLIP, "projection_dim": 32,
        "image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN}),
    hf("llava", "LlavaConfig", "LlavaForConditionalGeneration", images_in_text, _LLAVA),
    hf("llava-unpadded", "LlavaConfig", "LlavaForConditionalGeneration", images_in_unpadded_text,
       _LLAVA, known_difference=_NO_MASK),
)  # fmt: skip
