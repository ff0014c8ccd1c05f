"""The models of tools/bench.py: small ones for a CPU, the usual sizes for a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
Batch = tuple[Tensor, ...]
# A model, its loss from the model and a batch, and a batch.
Case = tuple[nn.Module, Callable[..., Tensor], Batch]


class RMSBlock(nn.Module):
    """A block of Llama: RMSNorm, attention without bias, gated MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 3 * width, bias=False)
        self.up = nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, is_causal: bool = True) -> Tensor:
        """From and to a batch of sequences, ``(batch, length, width)``."""
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Encoder(nn.Module):
    """A BERT-like encoder over token ids, or a ViT over flattened patches."""

    def __init__(self, inputs: int, width: int, layers: int, outputs: int, tokens: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(inputs, width) if tokens else nn.Linear(inputs, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=not tokens,
        )  # fmt: skip
        self.layers = nn.ModuleList(
            nn.TransformerEncoder(layer, 1, enable_nested_tensor=False) for _ in range(layers)
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Scores for every place."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Llama(nn.Module):
    """A stack of :class:`RMSBlock` between an embedding and a head."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(RMSBlock(width, width // 64) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the next token, for every place."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Residual(nn.Module):
    """Two convolutions with batch norm around a shortcut, as in ResNet-18."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.short = nn.Conv2d(before, after, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Halve the picture if the stride is 2."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.short is None else self.short(x)))


def _scores(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    scores = model(x)
    return F.cross_entropy(scores.reshape(-1, scores.shape[-1]).float(), target.reshape(-1))


def gpt(large: bool) -> Case:
    """GPT: 124 million parameters and a vocabulary of 50304 on a GPU, else 3.3 million on bytes."""
    sys.path.insert(0, str(ROOT / "examples"))
    from gpt import GPT, GPTConfig

    if large:
        config = GPTConfig(vocabulary=50304, context=1024, width=768, layers=12, heads=12)
        batch = torch.randint(0, 50304, (8, 1025))
    else:
        config, batch = GPTConfig(), torch.randint(0, 256, (8, 129))
    model = GPT(config)
    if large:  # or the head would add another 39 million
        model.head.weight = model.tokens.weight
    return model, lambda model, x, y: model(x, y), (batch[:, :-1], batch[:, 1:])


def gpt_32k(large: bool) -> Case:
    """The GPT with a vocabulary of 32768: a step is mostly its last layer and the loss."""
    sys.path.insert(0, str(ROOT / "examples"))
    from gpt import GPT, GPTConfig

    shape = (8, 1025) if large else (8, 129)
    config = GPTConfig(vocabulary=32768, context=shape[1] - 1, layers=2)
    batch = torch.randint(0, 32768, shape)
    return GPT(config), lambda model, x, y: model(x, y), (batch[:, :-1], batch[:, 1:])


def bert(large: bool) -> Case:
    """A BERT-like encoder: base size on a GPU, else two layers of width 128."""
    width, layers, shape = (768, 12, (32, 512)) if large else (128, 2, (8, 64))
    ids = torch.randint(0, 1000, shape)
    return Encoder(1000, width, layers, 1000, tokens=True), _scores, (ids, ids)


def llama(large: bool) -> Case:
    """A Llama-like stack of RMSNorm blocks."""
    width, layers, shape = (1024, 8, (8, 1024)) if large else (128, 4, (8, 64))
    ids = torch.randint(0, 1000, shape)
    return Llama(1000, width, layers), _scores, (ids, ids)


def resnet(large: bool) -> Case:
    """A ResNet of basic blocks: ResNet-18's on a GPU, else four of them."""
    widths, batch, size = ([64, 128, 256, 512], 128, 112) if large else ([32, 64], 16, 32)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)]
    before = widths[0]
    for width in widths:
        layers += [Residual(before, width, 2), Residual(width, width, 1)]
        before = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 100)]
    data = torch.randn(batch, 3, size, size), torch.randint(0, 100, (batch,))
    return nn.Sequential(*layers), _scores, data


def vit(large: bool) -> Case:
    """A ViT on patches: small size on a GPU, else two layers of width 128."""
    width, layers, shape = (384, 12, (128, 197, 768)) if large else (128, 2, (8, 50, 192))
    target = torch.randint(0, 100, shape[:2])
    model = Encoder(shape[2], width, layers, 100, tokens=False)
    return model, _scores, (torch.randn(shape), target)


def mlp(large: bool) -> Case:
    """Thirty-two thin layers: a step is nothing but launches."""
    layers = [m for _ in range(32) for m in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    return model, _scores, (torch.randn(64, 64), torch.randint(0, 10, (64,)))


def mlp_wide(large: bool) -> Case:
    """Three wide layers, 25 million parameters: a step is matrix products and the update."""
    width, rows = (8192, 512) if large else (4096, 64)
    model = nn.Sequential(
        nn.Linear(1024, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 1000),
    )
    return model, _scores, (torch.randn(rows, 1024), torch.randint(0, 1000, (rows,)))


CASES: Mapping[str, Callable[[bool], Case]] = {
    "gpt": gpt, "gpt-32k": gpt_32k, "bert": bert, "llama": llama, "resnet": resnet, "vit": vit,
    "mlp": mlp, "mlp-wide": mlp_wide,
}  # fmt: skip

# Models that take token ids and targets, and return their loss.
RETURN_LOSS = frozenset({"gpt", "gpt-32k"})


def case(name: str, device: str, seed: int = 0) -> tuple[Any, Callable[..., Tensor], Batch]:
    """One model of the table on a device, its loss and its batch."""
    torch.manual_seed(seed)
    model, loss, batch = CASES[name](device == "cuda")
    return model.to(device), loss, tuple(value.to(device) for value in batch)
