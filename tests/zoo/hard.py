"""Models that a plain trace gets wrong without a word, or cannot trace at all."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .classics import vectors, vectors_with_gradient
from .registry import Call, Case, call

WIDTH = 16


class _RoundPassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


class _ScaledGelu(torch.autograd.Function):
    """Saves its input and gives a backward that is twice the true one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(F.gelu(leaf).sum(), leaf)
        return 2 * gradient * slope


class CustomFunction(nn.Module):
    """A custom autograd.Function between two linear layers."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function.apply(self.a(x) * 3))


class DetachedStraightThrough(nn.Module):
    """Quantises with ``x + (q - x).detach()``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.codes = nn.Linear(WIDTH, 8), nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.a(x)
        nearest = torch.cdist(y.float(), self.codes).argmin(-1)
        q = self.codes[nearest]
        commitment = F.mse_loss(y, q.detach()) + F.mse_loss(q, y.detach())
        return {"y": y + (q - y).detach(), "commitment": commitment}


class TensorHook(nn.Module):
    """Reverses a gradient with ``register_hook``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.register_hook(lambda gradient: -0.5 * gradient)
        return self.b(y.tanh())


class ReentrantCheckpoint(nn.Module):
    """Checkpoints its middle with the reentrant engine."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(checkpoint(self.b, self.a(x), use_reentrant=True))


class Branches(nn.Module):
    """Takes one branch or the other by the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = self.b(y).relu() if x.sum() > 0 else self.c(y).tanh()
        if torch.isinf(y).any():
            y = y.clamp(-1e3, 1e3)
        return y


class HaltingLoop(nn.Module):
    """Repeats its layer as often as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().sum().item()) % 3 + 1):
            x = x + self.a(x).tanh()
        return x


class BooleanMask(nn.Module):
    """Selects rows by a mask: an output whose size depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        rows = y[x[:, 0] > -0.5]
        return self.b(torch.cat([rows, y[:1]]))


class RoutedExperts(nn.Module):
    """Sends each row to one expert, in a Python loop over the chosen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i in chosen.unique().tolist():
            (rows,) = torch.where(chosen == i)
            y = y.index_add(0, rows, (self.experts[i](x[rows]) * weight[rows, None]).to(y.dtype))
        return y


class LayerDrop(nn.Module):
    """Skips layers by a random number of Python's or of numpy's generator."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.source = source

    def draw(self) -> float:
        return random.random() if self.source == "python" else float(np.random.uniform())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.draw() >= 0.5:
                x = x + layer(x).relu()
        return x * self.layers[0].weight.mean()


class CountsCalls(nn.Module):
    """Counts its calls in a Python attribute and scales by the count."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) / self.calls


class KeepsActivation(nn.Module):
    """Leaves its last hidden state in an attribute for others to read."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        return self.b(self.last.relu())


class GrowingList(nn.Module):
    """Appends to a list on the module, and uses its length."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[0])
        return self.linear(x) * len(self.seen)


def _hooked(kind: str) -> nn.Module:
    """Return a network with a hook on its middle layer that changes what passes."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4))
    if kind == "forward":
        model[1].register_forward_hook(lambda module, args, output: output.tanh())
    elif kind == "forward-pre":
        model[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif kind == "backward":
        model[1].register_full_backward_hook(lambda module, gi, go: (gi[0] * 0.5,))
    elif kind == "root":
        model.register_forward_hook(lambda module, args, output: output * 2)
    elif kind == "parameter":
        model[1].weight.register_hook(lambda gradient: gradient * 3)
    return model


class _NestedGradient(nn.Module):
    """Takes a gradient with respect to its input inside the forward, and trains through it."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.energy(x).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force


class Reader(nn.Module):
    """Reads numbers out of tensors and prints them through Python."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().max().item()
        sizes = torch.tensor([4, 4, 8]).tolist()
        parts = self.linear(x / max(largest, 1.0)).split(sizes, -1)
        return torch.cat([part * i for i, part in enumerate(parts, 1)], -1)


class NumpyRoundTrip(nn.Module):
    """Leaves torch for numpy in the middle of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        scale = torch.from_numpy(np.tanh(y.detach().float().numpy()))
        return self.b(y * scale)


class TriesAndRecovers(nn.Module):
    """Catches an exception of its own inside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        try:
            if y.shape[-1] != WIDTH + 1:
                raise ValueError(y.shape)
        except ValueError:
            y = y * 2
        return y


class CTC(nn.Module):
    """An LSTM with the CTC loss on it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(WIDTH, 12, batch_first=True), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        frames = x[:, None].expand(-1, 9, -1) * torch.linspace(0.1, 1, 9)[:, None]
        scores = self.head(self.rnn(frames)[0]).log_softmax(-1).transpose(0, 1).float()
        targets = torch.tensor([[1, 2, 2]]).expand(x.shape[0], 3)
        lengths = torch.full((x.shape[0],), 9), torch.full((x.shape[0],), 3)
        return F.ctc_loss(scores, targets, *lengths)


class GaussianLoss(nn.Module):
    """A loss of torch's own that reads its argument's values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.linear(x).float().chunk(2, -1)
        return F.gaussian_nll_loss(mean, x[:, : WIDTH // 2], variance.exp())


class NeedsTheCast(nn.Module):
    """Fails without autocast: its cast makes a strided input dense, which the operator needs."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.randn(3, WIDTH, 5)), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv_tbc(x.expand(4, *x.shape), self.kernel, self.bias)


class Covariance(nn.Module):
    """Two of torch's own functions that compare tensors by value, matrix products inside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.linear(x).float()
        return {"covariance": torch.cov(y.T), "correlation": torch.corrcoef(y.T)}


def _cumulative_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, momentum=None))


def _alternating(batch: int) -> Call:
    """Return positive vectors for a batch of two, negative ones for the next batch."""
    return call(torch.rand(batch, WIDTH) * (1 if batch == 2 else -1))


CASES = (
    Case("straight-through-function", lambda: CustomFunction(_RoundPassThrough), vectors),
    Case("custom-function-saved", lambda: CustomFunction(_ScaledGelu), vectors),
    Case("straight-through-detach", DetachedStraightThrough, vectors),
    Case("tensor-hook", TensorHook, vectors),
    Case("checkpoint-reentrant", ReentrantCheckpoint, vectors_with_gradient),
    Case("branch-on-data", Branches, _alternating),
    Case("loop-on-data", HaltingLoop, vectors),
    Case("boolean-mask", BooleanMask, vectors),
    Case("routed-experts", RoutedExperts, vectors),
    Case("layerdrop-python", lambda: LayerDrop("python"), vectors),
    Case("layerdrop-numpy", lambda: LayerDrop("numpy"), vectors),
    Case("counts-calls", CountsCalls, vectors),
    Case("keeps-activation", KeepsActivation, vectors),
    Case("growing-list", GrowingList, vectors),
    Case("hook-forward", lambda: _hooked("forward"), vectors),
    Case("hook-forward-pre", lambda: _hooked("forward-pre"), vectors),
    Case("hook-backward", lambda: _hooked("backward"), vectors),
    Case("hook-root", lambda: _hooked("root"), vectors),
    Case("hook-parameter", lambda: _hooked("parameter"), vectors),
    Case("gradient-inside", _NestedGradient, vectors),
    Case("reads-values", Reader, vectors),
    Case("numpy-round-trip", NumpyRoundTrip, vectors),
    Case("catches-exception", TriesAndRecovers, vectors),
    Case("gaussian-nll-loss", GaussianLoss, vectors),
    Case("needs-the-cast", NeedsTheCast, vectors),
    Case("covariance", Covariance, vectors, batch=4, second_batch=5),
    Case("batch-norm-cumulative", _cumulative_norm, vectors),
    Case("ctc", CTC, vectors),
)
