"""Exported for the CUDA provider and run by it: what the files of the CPU provider are held to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mpgraph
from mpgraph.onnx.targets import TARGETS

from .step_models import CASES
from .step_pairs import InTorch, Pair, errors
from .test_step_parity import UNITS
from .test_targets import ENDS, probe_ort

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not probe_ort._is_available("CUDAExecutionProvider"),
        reason="needs a CUDA device, and an onnxruntime that runs there",
    ),
]

# Three units instead of two: the provider's 16-bit products and torch's add up in other orders.
ON_CUDA = 1.5


def test_every_row_for_the_cuda_provider_holds() -> None:
    findings = list(probe_ort.probe(TARGETS["cuda"], (18, 23), ENDS))
    assert [finding for finding in findings if finding.is_wrong] == []


@pytest.fixture
def full_precision() -> Iterator[None]:
    """No TF32 in torch's convolutions, and no sums of parts of a product in 16 bit."""
    products: Any = torch.backends.cuda.matmul
    torch.backends.cudnn.allow_tf32 = False
    products.allow_fp16_reduced_precision_reduction = False
    products.allow_bf16_reduced_precision_reduction = False
    yield
    torch.backends.cudnn.allow_tf32 = True
    products.allow_fp16_reduced_precision_reduction = True
    products.allow_bf16_reduced_precision_reduction = True


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_steps_equal_their_graph_in_torch_on_cuda(
    name: str, precision: str, tmp_path: Path, full_precision: None
) -> None:
    """From the same state, dropout included, both on the GPU."""
    pair = Pair(CASES[name], precision, tmp_path, target="cuda")
    assert pair.trainer._device == "cuda"
    in_torch = InTorch(pair)
    limit = ON_CUDA * UNITS[precision] if precision in UNITS else 1e-5
    for size in (4, 3):
        batch = CASES[name].batch(size)
        results, state = in_torch.step(batch)
        result = pair.trainer.step(**pair.named(batch))
        assert result["loss"] == pytest.approx(float(results["loss"]), rel=limit)
        found = errors(pair.trainer.state_dict(), state, CASES[name].zero)
        assert max(found.values()) <= limit, found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_step_for_cuda_checks_itself_and_trains(
    precision: str, device: str, tmp_path: Path
) -> None:
    """Whatever device the model lies on at export."""
    case = CASES["mlp"]
    torch.manual_seed(0)
    model = case.model().to(device)
    batch: Any = tuple(value.to(device) for value in case.batch(8))
    step = mpgraph.TrainStep(
        model, torch.optim.AdamW(model.parameters()), case.loss, precision=precision
    )
    exported = step.export_onnx(tmp_path, example_inputs=batch, target="cuda")
    assert exported.error is not None
    trainer = mpgraph.runtime.OnnxTrainer(tmp_path)
    arrays = {n: v.cpu().numpy() for n, v in zip(trainer.inputs, batch, strict=True)}
    losses = [trainer.step(**arrays)["loss"] for _ in range(50)]
    assert losses[-1] < losses[0]


def test_a_checkpoint_goes_on_to_the_same_bits_on_cuda(tmp_path: Path) -> None:
    pair = Pair(CASES["mlp"], "fp16", tmp_path, torch.optim.AdamW, "cuda")
    batch = pair.named(CASES["mlp"].batch(4))
    pair.trainer.step(**batch)
    pair.trainer.save(tmp_path / "saved.safetensors")
    wanted = [pair.trainer.step(**batch)["loss"] for _ in range(3)]
    pair.trainer.load(tmp_path / "saved.safetensors")
    assert [pair.trainer.step(**batch)["loss"] for _ in range(3)] == wanted


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "encoder"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_inference_files_for_cuda_check_themselves(
    name: str, device: str, precision: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = CASES[name].model().eval().to(device)
    x = CASES[name].batch(4)[0].to(device)
    report = mpgraph.export_onnx(model, tmp_path / "m.onnx", x, precision=precision, target="cuda")
    assert report.check is not None, report
