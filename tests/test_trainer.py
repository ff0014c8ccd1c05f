"""A converted model in the Hugging Face Trainer, next to the Trainer's own ``bf16=True``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mpgraph

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def losses_of(model: Any, folder: Path, resume: Path | None = None, **options: Any) -> list[float]:
    """Six steps, logged one by one, with a checkpoint after three."""
    ids = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(1))
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3, seed=0,
        logging_steps=1, save_steps=3, report_to=[], disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_converted_model_trains_as_with_the_trainers_flag_and_resumes(tmp_path: Path) -> None:
    expected = losses_of(llama(), tmp_path / "flag", bf16=True)
    converted = mpgraph.convert(llama(), "bf16", policy="autocast-cpu")
    assert losses_of(converted, tmp_path / "converted") == expected
    again = mpgraph.convert(llama(), "bf16", policy="autocast-cpu")
    resumed = losses_of(again, tmp_path / "converted", tmp_path / "converted" / "checkpoint-3")
    assert resumed == expected
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "converted" / "checkpoint-6")
    for name, value in converted.state_dict().items():
        assert value.dtype is torch.float32
        assert torch.equal(saved.state_dict()[name], value)
