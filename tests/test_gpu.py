"""What only a GPU can show: no waiting, replays, torch's own modes, attention's first call."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpgraph
from mpgraph.module import state_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).resolve().parents[1]


class Net(nn.Module):
    """Some of everything: embedding, attention, norm, dropout, tied scores."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm, self.drop = nn.LayerNorm(32), nn.Dropout(0.1)
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return self.head(x)


def loss_fn(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), target.flatten())


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.randint(0, 64, (count, 4, 17), device="cuda")
    return [(row[:, :-1], row[:, 1:]) for row in ids]


def made(compile: Any, precision: str = "fp16", **more: Any) -> Any:
    torch.manual_seed(0)
    model = Net().cuda()
    model.drop.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return mpgraph.TrainStep(
        model, optimizer, loss_fn, precision=precision, compile=compile, **more
    )


@pytest.mark.parametrize("compile", [True, "reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 1.0, "accumulation_steps": 2}])
def test_a_step_waits_for_nothing(compile: Any, more: dict[str, Any]) -> None:
    step = made(compile, **more)
    several = batches(10)
    for batch in several[:6]:
        step(*batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(*batch) for batch in several[6:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_replay_trains_as_the_step_itself(precision: str) -> None:
    """A schedule, and a batch that overflows, included."""
    runs = []
    for compile in (True, "reduce-overhead"):
        step = made(compile, precision, check_finite=True)
        schedule = torch.optim.lr_scheduler.StepLR(step.optimizer, 3, 0.5)
        skipped = []
        torch.manual_seed(1)
        for index, batch in enumerate(batches(12)):
            if index == 6:
                step.model.norm.weight.data[0] = float("inf")
            step(*batch)
            skipped.append(bool(step.last_step_skipped))
            if index == 6:
                step.model.norm.weight.data[0] = 1.0
            schedule.step()
        runs.append((skipped, [p.detach().clone() for p in step.model.parameters()]))
    (skipped, plain), (skipped_again, replayed) = runs
    assert skipped == skipped_again
    assert skipped[6]
    assert sum(skipped[7:]) == 0
    for one, other in zip(plain, replayed, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_modes_of_torch_compile_train_a_converted_model(mode: str, precision: str) -> None:
    results = []
    for chosen in (None, mode):
        torch.manual_seed(0)
        model = mpgraph.convert(Net().cuda(), precision)
        model.drop.p = 0.0
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        if precision == "fp16":
            mpgraph.guard(optimizer, model)
        call = model if chosen is None else torch.compile(model, mode=chosen, fullgraph=True)
        torch.manual_seed(1)
        for ids, target in batches(8):
            loss = F.cross_entropy(call(ids).flatten(0, 1), target.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(loss.item())
    assert results[0] == pytest.approx(results[1], rel=2e-2)


def test_the_first_attention_of_a_process_is_captured_as_one_graph() -> None:
    code = (
        "import sys; sys.path[:0] = ['examples', '.']\n"
        "import mpgraph, torch\n"
        "from gpt import GPT, GPTConfig\n"
        "ids = torch.randint(0, 256, (2, 17), device='cuda')\n"
        "model = mpgraph.convert(GPT(GPTConfig(layers=1)).cuda(), 'bf16', capture='export')\n"
        "print(model(ids[:, :-1], ids[:, 1:]).isfinite().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_a_loss_in_chunks_is_the_loss() -> None:
    runs = []
    for rows in (None, 13):
        step = made(True, "bf16", chunk_loss_head=rows)
        torch.manual_seed(1)
        runs.append([step(*batch).item() for batch in batches(10)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


def test_blame_names_an_overflow_on_the_gpu() -> None:
    torch.manual_seed(0)
    model = mpgraph.convert(Net().cuda(), "fp16")
    nn.init.normal_(model.out.weight, std=1e5)
    ids, target = batches(1)[0]
    report = mpgraph.blame(
        model, ids, loss_fn=lambda scores: F.cross_entropy(scores.flatten(0, 1), target.flatten())
    )
    assert report.finding is not None
    assert report.finding.module == "out"


def test_the_loss_scale_is_on_the_gpu_before_anything_is_compiled() -> None:
    for model in (mpgraph.convert(Net().cuda(), "fp16"), mpgraph.convert(Net(), "fp16").cuda()):
        state = state_of(model)
        assert state.scale.value.scale.is_cuda
        assert state.settings.device == "cuda"
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        mpgraph.guard(optimizer, model)
        call = torch.compile(model, fullgraph=True)
        (ids, target), *_ = batches(1)
        for index in range(4):
            if index == 3:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                F.cross_entropy(call(ids).flatten(0, 1), target.flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_fused_kernels_take_the_gradients_of_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 1, 2), nn.Flatten(1)
    )
    x = torch.randn(8, 3, 16, 16, device="cuda")
    losses = []
    for compile in (False, True):
        net = copy.deepcopy(model).cuda()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
        step = mpgraph.TrainStep(
            net, optimizer, lambda net, x: net(x).float().square().mean(), precision="bf16",
            compile=compile,
        )  # fmt: skip
        losses.append([step(x).item() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize("compile", [True, "reduce-overhead"])
def test_dropout_draws_another_mask_at_every_step(compile: Any) -> None:
    torch.manual_seed(0)
    model = Net().cuda()
    model.drop.p = 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)

    def in_fp32(model: nn.Module, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(ids).float().flatten(0, 1), target.flatten())

    step = mpgraph.TrainStep(model, optimizer, in_fp32, precision="bf16", compile=compile)
    (batch,) = batches(1)
    losses = {step(*batch).item() for _ in range(6)}
    assert len(losses) == 6
    assert max(losses) < 1.2 * min(losses)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_recorded_in_the_dtype_that_they_run_in(
    kind: Any, precision: str
) -> None:
    """What follows them is cast by what is recorded: log_softmax has to run in fp32."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = kind(8, 8, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)[0].log_softmax(-1)

    torch.manual_seed(0)
    model, x = Recurrent().cuda(), torch.randn(2, 5, 8, device="cuda")
    converted = mpgraph.convert(copy.deepcopy(model), precision)
    low = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    hidden = copy.deepcopy(model).to(low).layers(x.to(low))[0]
    assert torch.equal(converted(x), hidden.float().log_softmax(-1))
    preset = mpgraph.convert(copy.deepcopy(model), precision, policy="autocast-cuda")
    with torch.autocast("cuda", low):
        assert torch.equal(preset(x), model(x))
