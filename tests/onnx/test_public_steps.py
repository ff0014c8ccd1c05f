"""Exported steps of public models: tiny configurations of Hugging Face and timm."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpgraph.onnx.functional import in_plain_operators
from tests.zoo.hf import BERT_LIKE, LLAMA_LIKE, make
from tests.zoo.timm_models import _VIT
from tests.zoo.timm_models import make as make_timm

from .step_models import Batch, Case, classify, images
from .step_pairs import InTorch, Pair, errors, in_torch_state
from .test_step_parity import UNITS

pytest.importorskip("onnxruntime")

FP32 = 1e-5
# How much further from torch onnxruntime may be than torch is from itself with other kernels.
FACTOR = 4.0


def own_loss(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
    """What a Hugging Face model computes itself."""
    return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss


def texts(n: int) -> Batch:
    """Tokens, of which the last row ends early, and themselves as labels."""
    tokens, mask = torch.randint(5, 99, (n, 12)), torch.ones(n, 12, dtype=torch.long)
    mask[-1, -2:] = 0
    return tokens, mask, tokens.masked_fill(mask == 0, -100)


_CERTAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_KEYS = tuple(f"bert.encoder.layer.{i}.attention.self.key.bias" for i in range(2))


def _llama(**options: Any) -> Case:
    return Case(
        lambda: make("LlamaConfig", "LlamaForCausalLM", **{**LLAMA_LIKE, **options}),
        texts,
        own_loss,
    )


CASES = {
    "hf-llama-small": _llama(num_hidden_layers=1),
    "hf-llama": _llama(),
    # A bias of keys changes no weight of a softmax: its true gradient is 0.
    "hf-bert": Case(
        lambda: make("BertConfig", "BertForMaskedLM", **BERT_LIKE, **_CERTAIN),
        texts,
        own_loss,
        zero=_KEYS,
    ),
    "timm-resnet": Case(lambda: make_timm("resnet10t"), images(3, 64, 5), classify),
    "timm-vit": Case(lambda: make_timm("vit_tiny_patch16_224", **_VIT), images(3, 32, 5), classify),
}
# An untrained ResNet amplifies each rounding, through batch norms over few values and ReLUs that
# fall to the other side: torch's own two kinds of convolution kernels differ as much.
AMPLIFIES = frozenset({"timm-resnet"})
QUICK = (("hf-llama-small", "fp32"),)


def _cases() -> Iterator[Any]:
    for name in CASES:
        library = {"hf": "transformers", "timm": "timm"}[name.partition("-")[0]]
        missing = importlib.util.find_spec(library) is None
        skip = pytest.mark.skipif(missing, reason=f"needs {library}")
        for precision in ("fp32", "fp16", "bf16"):
            slow = () if (name, precision) in QUICK else (pytest.mark.zoo, pytest.mark.timeout(600))
            yield pytest.param(name, precision, id=f"{name}-{precision}", marks=(skip, *slow))


@pytest.mark.parametrize(("name", "precision"), [*_cases()])
def test_steps_of_public_models_equal_those_of_torch(
    name: str, precision: str, tmp_path: Path
) -> None:
    """One step from the same state: in fp32 the step in torch, in 16 bit the exported graph."""
    case = CASES[name]
    pair = Pair(case, precision, tmp_path)
    assert pair.trainer.manifest.batch_size == "batch"
    in_torch = InTorch(pair)
    limit = UNITS.get(precision, FP32)
    for size in (4, 3):
        batch = case.batch(size)
        if precision == "fp32":
            pair.trainer._buffers.put({k: v.numpy() for k, v in in_torch_state(pair).items()})
        noise = _noise(in_torch, batch) if name in AMPLIFIES else 0.0
        loss, state = _step(pair, batch) if precision == "fp32" else _graph_step(in_torch, batch)
        result = pair.trainer.step(**pair.named(batch))
        allowed = max(limit, FACTOR * noise)
        assert result["loss"] == pytest.approx(loss, rel=allowed)
        found = errors(pair.trainer.state_dict(), state, case.zero)
        assert max(found.values()) <= allowed, found


def _step(pair: Pair, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    with in_plain_operators():
        loss = pair.step(*batch)
    return float(loss), in_torch_state(pair)


def _graph_step(in_torch: InTorch, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    results, state = in_torch.step(batch)
    return float(results["loss"]), state


def _noise(in_torch: InTorch, batch: Batch) -> float:
    """How far torch is from itself, with one kind of convolution kernels and the other."""
    _, state = in_torch.step(batch)
    with in_plain_operators():
        _, other = in_torch.step(batch)
    return max(errors(other, state).values())
