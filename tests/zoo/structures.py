"""Models that are ordinary in their arithmetic and awkward in everything around it."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .classics import HIDDEN_IN_BILINEAR, images, vectors
from .registry import Call, Case, call, quick

# Importing torch.utils.checkpoint under a name of its own would shadow torch here.
from torch.utils.checkpoint import checkpoint  # isort: skip

WIDTH = 16


@dataclasses.dataclass
class Prediction:
    """A dataclass that torch's pytree does not know."""

    logits: Tensor
    hidden: Tensor | None = None
    name: str = "prediction"


class Pair(NamedTuple):
    """A named tuple as output."""

    first: Tensor
    second: Tensor


class InPlaceBuffers(nn.Module):
    """Buffers changed in place: a running mean, a step counter, a ring of past rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("ring", torch.zeros(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        with torch.no_grad():
            self.mean.lerp_(y.detach().float().mean(0), 0.1)
            self.count += 1
            self.ring.copy_(self.ring.roll(1, 0))
            self.ring[0] = y[0].float()
        return y - self.mean


class AssignedBuffers(nn.Module):
    """Buffers replaced by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().float().mean(0)
        self.count = self.count + 1
        return y * self.mean


class NestedOutputs(nn.Module):
    """Dictionaries in tuples in lists, None, numbers and one tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        a = self.a(x)
        b = self.b(a.relu())
        pair = Pair(a, b)
        ordered = OrderedDict(z=a.sum(), y=b.mean(-1))
        return {"pair": pair, "list": [a, (b, None)], "ordered": ordered, "number": 3, "again": a}


class DataclassOutput(nn.Module):
    """Returns a dataclass with a None and a string in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Prediction:
        return Prediction(self.linear(x))


class ModelOutputs(nn.Module):
    """Returns its input, a view of it, an integer and a detached tensor beside the result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.linear(x)
        return y, x, x[:, ::2], y.argmax(-1), y.detach(), y > 0


class AutocastIslands(nn.Module):
    """A region with autocast off, and one that asks for float16."""

    def __init__(self, inner: torch.dtype | None) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.inner is None:
            with torch.autocast("cpu", enabled=False):
                x = self.b(x.float()).exp().clamp(max=4)
        else:
            with torch.autocast("cpu", self.inner):
                x = self.b(x)
        return self.c(x) + self.a(x)


class NoGradRegion(nn.Module):
    """A target branch without gradient, the same weights as the online one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.online, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.how = how

    def target(self, x: Tensor) -> Tensor:
        if self.how == "detach":
            return self.online(x).detach()
        with torch.no_grad():
            y = self.online(x).softmax(-1)
            with torch.enable_grad():
                kept = self.head(x)
        return y + kept * 0.1

    def forward(self, x: Tensor) -> Tensor:
        target = self.target(x.flip(0))
        return F.mse_loss(self.head(self.online(x)), target)


class InPlace(nn.Module):
    """In-place arithmetic, slices assigned, a mask filled in place, out= arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.mul_(2).add_(x, alpha=0.5)
        z = self.b(y).clone()
        z[:, :4] = y[:, 4:8].tanh()
        z[:, 5].fill_(1.0)
        z.masked_fill_(z < -1, 0.0)
        canvas = torch.zeros_like(x)
        canvas[:, 1:] += z[:, :-1]
        return canvas.clamp_(-3, 3)


class MutatesInput(nn.Module):
    """Changes its argument in place before using it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        y = self.linear(x)
        x.add_(y.detach())
        return y


class Indexing(nn.Module):
    """index_put, scatter, gather, topk, sort, cumsum, where, one-hot, searchsorted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.table = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(6, WIDTH))

    def forward(self, x: Tensor, index: Tensor) -> dict[str, Tensor]:
        y = self.a(x)
        top, where = y.topk(4, -1)
        put = torch.zeros(6, WIDTH, dtype=y.dtype).index_put((index,), y, accumulate=True)
        added = torch.zeros_like(put).scatter_add(0, index[:, None].expand_as(y), y)
        one_hot = F.one_hot(index, 6).to(y.dtype) @ self.table.to(y.dtype)
        return {
            "top": top,
            "where": where,
            "put": put * self.table[:, :1],
            "added": added,
            "gathered": y.gather(-1, where).cumsum(-1),
            "sorted": y.sort(-1, descending=True).values.cumprod(-1),
            "chosen": torch.where(y > 0, y, self.table[index]),
            "one_hot": one_hot.index_select(-1, where[0]),
            "diagonal": torch.diagonal(y.T @ y).tril(0) if y.ndim > 2 else (y.T @ y).tril(),
            "reduced": torch.stack([y.amax(-1), y.logsumexp(-1), y.var(-1), y.norm(dim=-1)]),
            "median": y.median(-1).values + y.float().quantile(0.3, -1),
        }


class LinearAlgebra(nn.Module):
    """baddbmm, addmm, outer, dot, cdist, kron, matrix powers, solve and inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8) + 0.1 * torch.randn(8, 8))
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        w = self.weight
        y = torch.addmm(self.bias, x, w, beta=0.5)
        batch = y[:, None] * w
        return {
            "addmm": y,
            "baddbmm": torch.baddbmm(batch, batch, batch.mT),
            "mv": w.mv(y.float()[0]) + torch.addmv(self.bias, w, x[0]),
            "dot": torch.dot(w[0], self.bias + 1) + torch.vdot(w[1], w[2]),
            "outer": torch.outer(w[0], self.bias + 1) + torch.addr(w, w[0], w[1]),
            "cdist": torch.cdist(x, w),
            "chain": torch.chain_matmul(x, w, w) + torch.linalg.multi_dot([x, w, w]),
            "tensordot": torch.tensordot(x, w, 1),
            "solve": torch.linalg.solve(w, x.T),
            "power": torch.linalg.matrix_power(w, 3),
            "inverse": torch.linalg.inv(w),
            "kron": torch.kron(w[:2, :2], w[2:4, 2:4]),
            "fft": torch.fft.rfft(y.float()).abs(),
        }


class HiddenProducts(nn.Module):
    """Operators that are matrix products inside, whatever they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8) + 0.1 * torch.randn(8, 8))
        self.kernel = nn.Parameter(torch.randn(3, 8, 5) * 0.2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        w = self.weight
        return {
            "inner": torch.inner(x, w),
            "vecdot": torch.linalg.vecdot(x[:, None], w),
            "conv_tbc": torch.conv_tbc(x.repeat(4, 1, 1), self.kernel, w[0, :5]),
            "bilinear": F.bilinear(x, x.tanh(), w[:, :, None] * w),
            "affine_grid": F.affine_grid(w[:, :6].reshape(8, 2, 3), [8, 1, 4, 4], False),
        }


class KeywordOnly(nn.Module):
    """Keyword-only and default arguments, one of them a flag, one absent."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(
        self, x: Tensor, *, scale: float = 2.0, flip: bool = False, bias: Tensor | None = None
    ) -> Tensor:
        y = self.a(x.flip(-1) if flip else x) * scale
        return self.b(y if bias is None else y + bias)


class TensorList(nn.Module):
    """Takes a list of tensors and a dictionary of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 8) for width in (4, 6))

    def forward(self, parts: list[Tensor], extra: dict[str, Tensor]) -> list[Tensor]:
        done = [layer(part) for layer, part in zip(self.layers, parts, strict=True)]
        return [*done, torch.cat(done, -1) @ extra["projection"]]


class VariableArguments(nn.Module):
    """``*args`` and ``**kwargs`` in the signature."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, *parts: Tensor, **named: Tensor) -> dict[str, Tensor]:
        y = self.linear(sum(parts, start=torch.zeros(())))
        return {name: y * value for name, value in named.items()}


class MixtureOfExperts(nn.Module):
    """Top-2 routing over all experts at once, with a load-balancing loss."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, 32) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, 32, WIDTH) * 0.1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        weights = self.router(x).softmax(-1, dtype=torch.float32)
        top, chosen = weights.topk(2, -1)
        gate = torch.zeros_like(weights).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        hidden = F.gelu(torch.einsum("bd,edh->beh", x, self.up))
        y = torch.einsum("beh,ehd->bed", hidden, self.down)
        return {"y": (y * gate[..., None].to(y.dtype)).sum(1), "balance": weights.mean(0).var()}


class ReadsDtypes(nn.Module):
    """Asks tensors for their dtype and acts on the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        floor = torch.finfo(y.dtype).min
        scale = 0.5 if y.dtype is torch.bfloat16 else 0.25
        noise = torch.linspace(0, 1, WIDTH, dtype=y.dtype)
        z = self.b((y * scale + noise).float().type_as(y))
        return torch.where(z > 3, floor / 1e37, z).to(self.a.weight.dtype)


class DoublePrecision(nn.Module):
    """Float64 inside a float32 model: autocast leaves it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).double()).softmax(-1).float()


class NonReentrantCheckpoint(nn.Module):
    """Recomputes its blocks, dropout included, without the reentrant engine."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.2)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x


class FrozenPart(nn.Module):
    """A frozen trunk under a trained head, with one frozen bias in it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.trunk.requires_grad_(False)
        self.head.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).relu())


def _indexed(batch: int) -> Call:
    return call(torch.randn(batch, WIDTH), torch.randint(0, 6, (batch,)))


def _parts(batch: int) -> Call:
    parts = [torch.randn(batch, 4), torch.randn(batch, 6, requires_grad=True)]
    return call(parts, {"projection": torch.randn(16, 3)})


def _keywords(batch: int) -> Call:
    return call(x=torch.randn(batch, WIDTH), bias=torch.randn(WIDTH, requires_grad=True), flip=True)


def _variable(batch: int) -> Call:
    return call(torch.randn(batch, WIDTH), torch.randn(batch, WIDTH), a=torch.ones(1))


CASES = (
    quick(Case("buffers-in-place", InPlaceBuffers, vectors)),
    quick(Case("buffers-assigned", AssignedBuffers, vectors)),
    quick(Case("outputs-nested", NestedOutputs, vectors)),
    quick(Case("outputs-dataclass", DataclassOutput, vectors)),
    Case("outputs-aliased", ModelOutputs, vectors),
    quick(Case("island-disabled", lambda: AutocastIslands(None), vectors)),
    Case("island-float16", lambda: AutocastIslands(torch.float16), vectors),
    quick(Case("no-grad-region", lambda: NoGradRegion("no_grad"), vectors)),
    Case("detached-target", lambda: NoGradRegion("detach"), vectors),
    quick(Case("in-place", InPlace, vectors)),
    Case("mutates-input", MutatesInput, vectors),
    quick(Case("indexing", Indexing, _indexed)),
    Case("linear-algebra", LinearAlgebra, lambda b: vectors(b, 8)),
    Case(
        "hidden-products",
        HiddenProducts,
        lambda b: vectors(b, 8),
        known_difference=HIDDEN_IN_BILINEAR,
    ),
    quick(Case("keyword-only", KeywordOnly, _keywords)),
    Case("tensor-list", TensorList, _parts),
    Case("variable-arguments", VariableArguments, _variable),
    Case("mixture-of-experts", MixtureOfExperts, vectors),
    quick(Case("reads-dtypes", ReadsDtypes, vectors)),
    Case("float64-part", DoublePrecision, vectors),
    Case("checkpoint-non-reentrant", NonReentrantCheckpoint, vectors),
    quick(Case("frozen-part", FrozenPart, vectors)),
    Case(
        "images-as-float64",
        lambda: nn.Conv2d(3, 4, 3).double(),
        lambda b: call(images(b).args[0].double()),
    ),
)
