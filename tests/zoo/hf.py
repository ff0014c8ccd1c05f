"""Text models of Hugging Face transformers, from tiny configurations with random weights."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .registry import Call, Case, call, quick

# Everything here is built from a configuration; nothing may ask the network for more.
os.environ["HF_HUB_OFFLINE"] = "1"

WORDS, LENGTH = 99, 12

BERT_LIKE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
LLAMA_LIKE = {**BERT_LIKE, "num_key_value_heads": 2, "pad_token_id": 0}
SEQ2SEQ = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
T5_LIKE = {
    "vocab_size": WORDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def make(config: str, model: str, **options: Any) -> nn.Module:
    """Return a model of transformers by class name, from a configuration of its own class."""
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options))


def words(batch: int, length: int = LENGTH) -> torch.Tensor:
    """Return random tokens, none of them special."""
    return torch.randint(5, WORDS, (batch, length))


def padding_mask(batch: int, length: int = LENGTH) -> torch.Tensor:
    """Return an attention mask in which the last row ends two tokens early."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return mask


def language(batch: int, length: int = LENGTH) -> Call:
    """Return tokens with padding, and themselves as labels."""
    tokens = words(batch, length)
    mask = padding_mask(batch, length)
    return call(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))


def unpadded_language(batch: int, length: int = LENGTH) -> Call:
    """Return tokens and themselves as labels, with no attention mask."""
    tokens = words(batch, length)
    return call(input_ids=tokens, labels=tokens)


def sentence_class(batch: int) -> Call:
    """Return tokens with one label for each sequence."""
    labels = torch.randint(0, 2, (batch,))
    return call(input_ids=words(batch), attention_mask=padding_mask(batch), labels=labels)


def token_class(batch: int) -> Call:
    """Return tokens with one label for each token."""
    labels = torch.randint(0, 2, (batch, LENGTH))
    return call(input_ids=words(batch), attention_mask=padding_mask(batch), labels=labels)


def answer_span(batch: int) -> Call:
    """Return tokens with start and end of an answer."""
    start, end = torch.randint(0, LENGTH, (2, batch))
    return call(input_ids=words(batch), start_positions=start, end_positions=end)


def plain_tokens(batch: int) -> Call:
    """Return tokens alone, for a model without a loss."""
    return call(words(batch))


def translation(batch: int) -> Call:
    """Return source tokens with padding, and target tokens as labels."""
    return call(
        input_ids=words(batch), attention_mask=padding_mask(batch), labels=words(batch, LENGTH - 3)
    )


def hf(
    name: str,
    config: str,
    model: str,
    inputs: Callable[[int], Call],
    options: dict[str, Any],
    **about: Any,
) -> Case:
    """Return the case of one model class of transformers."""
    return Case(f"hf-{name}", functools.partial(make, config, model, **options), inputs, **about)


_GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MIXTRAL = {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}

CASES = (
    quick(hf("bert", "BertConfig", "BertForMaskedLM", language, BERT_LIKE)),
    hf("bert-classifier", "BertConfig", "BertForSequenceClassification", sentence_class, BERT_LIKE),
    hf("bert-base", "BertConfig", "BertModel", plain_tokens, BERT_LIKE),
    hf("albert", "AlbertConfig", "AlbertForMaskedLM", language,
       {**BERT_LIKE, "embedding_size": 16}),
    hf("electra", "ElectraConfig", "ElectraForTokenClassification", token_class,
       {**BERT_LIKE, "embedding_size": 16}),
    hf("funnel", "FunnelConfig", "FunnelForMaskedLM", unpadded_language,
       {"vocab_size": WORDS, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8,
        "d_inner": 64, "num_decoder_layers": 1}),
    hf("fnet", "FNetConfig", "FNetForMaskedLM", unpadded_language,
       {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64,
        "max_position_embeddings": 64}),
    hf("roberta", "RobertaConfig", "RobertaForQuestionAnswering", answer_span,
       {**BERT_LIKE, "pad_token_id": 1}),
    hf("distilbert", "DistilBertConfig", "DistilBertForSequenceClassification", sentence_class,
       {"vocab_size": WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64,
        "max_position_embeddings": 64}),
    hf("deberta-v2", "DebertaV2Config", "DebertaV2ForMaskedLM", language,
       {**BERT_LIKE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False}),
    quick(hf("llama", "LlamaConfig", "LlamaForCausalLM", language, LLAMA_LIKE)),
    hf("llama-eager-attention", "LlamaConfig", "LlamaForCausalLM", language,
       {**LLAMA_LIKE, "attn_implementation": "eager"}),
    hf("llama-cache", "LlamaConfig", "LlamaModel", plain_tokens, LLAMA_LIKE),
    hf("mixtral", "MixtralConfig", "MixtralForCausalLM", language,
       {**_MIXTRAL, "output_router_logits": True}),
    hf("jetmoe", "JetMoeConfig", "JetMoeForCausalLM", language,
       {**LLAMA_LIKE, "num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 4}),
    quick(hf("gpt2", "GPT2Config", "GPT2LMHeadModel", language, _GPT2)),
    hf("gpt-neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", language, BERT_LIKE),
    hf("opt", "OPTConfig", "OPTForCausalLM", language,
       {**BERT_LIKE, "ffn_dim": 64, "word_embed_proj_dim": 16}),
    hf("xlnet", "XLNetConfig", "XLNetLMHeadModel", unpadded_language,
       {"vocab_size": WORDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    hf("qwen2", "Qwen2Config", "Qwen2ForCausalLM", language, LLAMA_LIKE),
    hf("gemma", "GemmaConfig", "GemmaForCausalLM", language, {**LLAMA_LIKE, "head_dim": 8}),
    hf("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", language,
       {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"]}),
    hf("mistral", "MistralConfig", "MistralForCausalLM", language,
       {**LLAMA_LIKE, "sliding_window": 8}),
    hf("phi", "PhiConfig", "PhiForCausalLM", language, BERT_LIKE),
    hf("mamba", "MambaConfig", "MambaForCausalLM", unpadded_language,
       {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    hf("deepseek-v3", "DeepseekV3Config", "DeepseekV3ForCausalLM", language,
       {**LLAMA_LIKE, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_group": 2,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "topk_group": 1, "q_lora_rank": 16,
        "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "first_k_dense_replace": 1}),
    quick(hf("t5", "T5Config", "T5ForConditionalGeneration", translation, T5_LIKE)),
    hf("longt5", "LongT5Config", "LongT5ForConditionalGeneration", translation,
       {**T5_LIKE, "local_radius": 4}),
    hf("bart", "BartConfig", "BartForConditionalGeneration", translation, SEQ2SEQ),
    hf("pegasus", "PegasusConfig", "PegasusForConditionalGeneration", translation, SEQ2SEQ),
)  # fmt: skip
