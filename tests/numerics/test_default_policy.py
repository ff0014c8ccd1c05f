"""The default policy, judged from outside: by watching the run, and by float64 gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mpgraph

aten = torch.ops.aten
BF16 = torch.bfloat16
SEEDS = range(4)

MATRIX = {
    aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution, aten.mkldnn_rnn_layer,
    aten._scaled_dot_product_flash_attention_for_cpu,
}  # fmt: skip
WIDE = {
    aten._softmax, aten._log_softmax, aten.native_layer_norm, aten.native_group_norm,
    aten.native_batch_norm, aten.mean, aten.sum, aten.var, aten.cumsum, aten.logsumexp,
    aten.exp, aten.log, aten.pow, aten.rsqrt, aten.nll_loss_forward, aten.nll_loss2d_forward,
    aten.mse_loss, aten.prod, aten.norm, aten.linalg_vector_norm, aten.std,
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Notes the floating dtypes that reach each kernel; knows nothing of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtypes = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
        if kwargs.get("dtype") is not None:  # sum(x, dtype=float32) computes in float32
            dtypes = {kwargs["dtype"]}
        self.seen.setdefault(func.overloadpacket, set()).update(dtypes)
        return func(*args, **kwargs)


class Attention(nn.Module):
    """Written out, so that its softmax is an operator of its own."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return x + self.out(torch.einsum("bts,bsc->btc", weights, v))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.blocks = nn.Sequential(Attention(), Attention())
        self.head = nn.Linear(32, 50)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.blocks(self.table(ids)))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.GELU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True), nn.GELU(),
            nn.ConvTranspose2d(16, 8, 2, stride=2),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).mean((2, 3))
        spread = h.var(0).sum() + h.exp().logsumexp(-1).mean() + h.pow(2).sum().rsqrt()
        return self.head(h).log_softmax(-1).square().mean() + 0.01 * spread


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(16, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0]).cumsum(1).square().mean()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "classifier": (Classifier, lambda: torch.randint(0, 50, (4, 12))),
    "conv-net": (ConvNet, lambda: torch.randn(4, 3, 16, 16)),
    "sequence": (Sequence, lambda: torch.randn(4, 10, 16)),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2
        ),
        lambda: torch.randn(4, 12, 32),
    ),
}
on_every_case = pytest.mark.parametrize("name", CASES)


def seen_by_kernels(model: nn.Module, x: Tensor) -> dict[Any, set[torch.dtype]]:
    model(x)  # captures; the watched call then runs the graph only
    with Watch() as watch:
        model(x)
    return watch.seen


@on_every_case
def test_every_matrix_product_runs_in_bf16(name: str):
    build, inputs = CASES[name]
    seen = seen_by_kernels(mpgraph.convert(build(), "bf16"), inputs())
    watched = {op: seen[op] for op in MATRIX if op in seen}
    assert watched
    assert all(dtypes == {BF16} for dtypes in watched.values()), watched


@on_every_case
def test_every_reduction_softmax_norm_and_loss_runs_in_float32(name: str):
    build, inputs = CASES[name]
    seen = seen_by_kernels(mpgraph.convert(build(), "bf16"), inputs())
    watched = {op: seen[op] for op in WIDE if op in seen}
    assert watched
    assert all(dtypes == {torch.float32} for dtypes in watched.values()), watched


def test_the_watch_sees_what_torch_autocast_leaves_in_16_bit():
    model, x = ConvNet(), torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", BF16), Watch() as watch:
        model(x)
    assert BF16 in watch.seen[aten.native_group_norm]


def relative_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    error = sum((got[n].double() - want[n]).square().sum() for n in want)
    return float((error / sum(w.square().sum() for w in want.values())).sqrt())


def gradients(model: nn.Module, x: Tensor, context: Any) -> dict[str, Tensor]:
    with context:
        out = model(x)
    if out.ndim:
        out = out.to(torch.promote_types(out.dtype, torch.float32)).square().mean()
    out.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def errors(name: str, seed: int) -> tuple[float, float]:
    """Relative errors of torch.autocast's and of mpgraph's gradients against float64."""
    build, inputs = CASES[name]
    torch.manual_seed(seed)
    model, x = build(), inputs()
    wide = x.double() if x.is_floating_point() else x
    exact = gradients(copy.deepcopy(model).double(), wide, contextlib.nullcontext())
    with torch.backends.mkldnn.flags(enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        # Without bf16 instructions, oneDNN refuses an LSTM under autocast; torch's own kernel runs.
        autocast = gradients(copy.deepcopy(model), x, torch.autocast("cpu", BF16))
    ours = gradients(mpgraph.convert(copy.deepcopy(model), "bf16"), x, contextlib.nullcontext())
    assert ours.keys() == exact.keys()
    return relative_error(autocast, exact), relative_error(ours, exact)


@on_every_case
def test_gradients_are_within_bf16_rounding_and_no_further_off_than_autocast(name: str):
    measured = [errors(name, seed) for seed in SEEDS]
    autocast = sum(error for error, _ in measured) / len(measured)
    ours = sum(error for _, error in measured) / len(measured)
    assert ours < 8 * 2**-8  # bf16 keeps 8 bits; a few roundings meet in each gradient
    # Seeds move either side by some per cent; a policy that lost precision would show as more.
    assert ours <= 1.05 * autocast
