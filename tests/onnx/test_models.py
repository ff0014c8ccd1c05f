"""Exported files of public models, and of the zoo, against torch.

The limits are those of test_export.py. What can be exported is run in fp32, fp16 and bf16; what
cannot is refused with the reason, never with torch's own error.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

import mpgraph
from tests.onnx.test_export import FP32, UNITS
from tests.zoo.registry import all_cases

pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.zoo,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(600),
]

EXPORTED = (
    "conv-net", "conv-zoo", "conv1d", "conv3d", "residual-block", "norms", "unet", "embedding-bag",
    "spectral-norm", "gru-deep-bidirectional", "lstm-projection", "rnn-cells",
    "einsum-attention", "rotary-block",
    "multihead-attention", "encoder-pre-norm", "resampling", "losses", "mixture-of-experts",
    "float64-part", "in-place", "hf-bert", "hf-llama", "hf-llama-cache", "hf-gpt2", "hf-t5",
    "hf-roberta", "hf-distilbert", "hf-electra", "hf-qwen2", "hf-gemma", "hf-mistral", "hf-bart",
    "hf-clip", "hf-vit", "timm-resnet", "timm-vit", "timm-convnext", "timm-swin",
)  # fmt: skip
REFUSED = {
    "vae": "draws random numbers",
    "orthogonal": "no translation to ONNX of",
    "lstm-packed": "cannot be one graph",
    "outputs-nested": "returns 3 as output 'number'",
}


def export(path, model, call, precision):
    args, kwargs = call
    if args and kwargs:
        pytest.skip("an example is positional or by keyword")
    return mpgraph.export_onnx(model.eval(), path, kwargs or args, precision=precision)


def hold(report, precision):
    if precision == "fp32":
        assert report.check.error <= FP32
    else:
        assert report.check.units <= UNITS


def zoo_call(case):
    call = case.inputs(case.batch)
    return call.args, dict(call.kwargs)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", EXPORTED)
def test_a_model_of_the_zoo_gives_the_numbers_of_its_exported_graph(tmp_path, name, precision):
    for prefix, library in (("hf-", "transformers"), ("timm-", "timm")):
        if name.startswith(prefix) and importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    torch.manual_seed(0)
    case = all_cases()[name]
    hold(export(tmp_path / "m.onnx", case.model(), zoo_call(case), precision), precision)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_file_is_refused_with_the_reason(tmp_path, name):
    case = all_cases()[name]
    with pytest.raises(mpgraph.ExportError, match=REFUSED[name]):
        export(tmp_path / "m.onnx", case.model(), zoo_call(case), "bf16")
