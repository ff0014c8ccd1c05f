"""generate() of a converted model of transformers against generate() under torch.autocast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import mpgraph
from mpgraph.module import state_of

transformers = pytest.importorskip("transformers")
VOCABULARY = 61


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
        )
    )


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=1, n_head=4, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1
        )
    )


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_layers=1,
            num_heads=4,
            vocab_size=VOCABULARY,
            decoder_start_token_id=0,
        )
    )


@pytest.mark.filterwarnings("ignore:mpgraph")
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("build", [llama, gpt2, t5])
def test_generate_gives_the_tokens_of_autocast(build, use_cache):
    torch.manual_seed(0)
    model = build().eval()
    prompt = torch.randint(2, VOCABULARY, (2, 7))
    options = {
        "max_new_tokens": 30,
        "do_sample": False,
        "use_cache": use_cache,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(prompt, **options)
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu", max_graphs=6)
    for _ in range(2):  # a first call may only have warmed something up
        assert torch.equal(converted.generate(prompt, **options), expected)
    # Growing lengths do not bring ever new graphs: 60 calls, and a handful of kinds.
    assert len(state_of(converted).specialisations()) <= 3
