"""Models whose steps are exported: small, and together of every kind of operator."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its loss and its batches.

    Attributes:
        model: Makes it.
        batch: Makes a batch of so many rows.
        loss: Takes the model and a batch.
        draws: Whether it draws random numbers.
        zero: Parameters whose true gradient is 0: biases before a batch norm.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[..., Any]
    draws: bool = False
    zero: tuple[str, ...] = ()


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(x).float(), y)


def next_token(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy over every position."""
    return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


def regress(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(model(x).float(), y)


def own_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What the model returns."""
    return model(x, y)


def images(channels: int, size: int, classes: int) -> Callable[[int], Batch]:
    """Batches of images with classes."""
    return lambda n: (torch.randn(n, channels, size, size), torch.randint(0, classes, (n,)))


def tokens(vocabulary: int, length: int) -> Callable[[int], Batch]:
    """Batches of token sequences, each with another as its targets."""
    shape = (length,)
    return lambda n: tuple(torch.randint(0, vocabulary, (n, *shape)) for _ in range(2))


def mlp() -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(
        nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)
    )


class CNN(nn.Module):
    """Convolutions, batch norms, pools, dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.avg_pool2d(F.gelu(self.norm2(self.conv2(x))), 2)
        return self.head(self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class Convs(nn.Module):
    """Convolutions of every kind: grouped, strided, dilated, depthwise, transposed, 1d."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, padding=1)
        self.dilated = nn.Conv2d(8, 8, 3, dilation=2, padding=2, stride=2)
        self.depthwise = nn.Conv2d(8, 16, (3, 1), groups=8)
        self.transposed = nn.ConvTranspose2d(16, 6, 3, stride=2, padding=1, output_padding=1)
        self.grouped_up = nn.ConvTranspose2d(6, 4, 2, stride=3, groups=2)
        self.line = nn.Conv1d(4, 3, 4, stride=3)

    def forward(self, x: Tensor) -> Tensor:
        """Values, of which nobody knows what they mean."""
        x = F.relu(self.dilated(F.relu(self.grouped(F.relu(self.strided(x))))))
        x = self.grouped_up(F.relu(self.transposed(F.relu(self.depthwise(x)))))
        return self.line(x.flatten(2)).mean(-1)


class Encoder(nn.Module):
    """A BERT-like encoder with a padding mask."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(40, 16, padding_idx=0), nn.Embedding(12, 16)
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, dropout, activation="gelu", batch_first=True, norm_first=False
        )
        self.layers = nn.ModuleList([layer])
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of a sequence, by its first token."""
        hidden = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=x == 0)
        return self.head(hidden[:, 0].tanh())


def padded(n: int) -> Batch:
    """Sequences of several lengths, padded with 0, and classes."""
    x = torch.randint(1, 40, (n, 12))
    lengths = torch.randint(4, 13, (n, 1))
    return x.masked_fill(torch.arange(12) >= lengths, 0), torch.randint(0, 3, (n,))


class ViT(nn.Module):
    """Patches, a class token, one encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, 16))
        self.layer = nn.TransformerEncoderLayer(
            16, 2, 32, 0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        return self.head(self.norm(self.layer(x))[:, 0])


class LSTM(nn.Module):
    """A language model with a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next word, at every position."""
        return self.head(self.lstm(self.words(x))[0])


class UNet(nn.Module):
    """Down, up, and across."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 4, 3, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Conv2d(8, 1, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        """A picture like ``x``."""
        a = F.leaky_relu(self.down(x))
        b = self.up(self.inner(F.max_pool2d(a, 2)))
        return self.out(torch.cat([a, F.interpolate(b, size=a.shape[-2:], mode="bilinear")], 1))


def pictures(n: int) -> Batch:
    """Pictures and pictures."""
    return torch.randn(n, 1, 8, 8), torch.randn(n, 1, 8, 8)


class Speech(nn.Module):
    """Frames of sound to classes of letters: convolution, group norm, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frames, self.norm = nn.Conv1d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.gru, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every letter, and of the blank, at every frame."""
        hidden = F.silu(self.norm(self.frames(x))).transpose(1, 2)
        return self.head(self.gru(hidden)[0])


def spoken(n: int) -> Batch:
    """Frames, letters, and how many there are of each."""
    lengths = torch.randint(1, 4, (n,))
    return torch.randn(n, 4, 9), torch.randint(1, 5, (n, 3)), lengths + 6, lengths


def transcribe(model: nn.Module, x: Tensor, y: Tensor, frames: Tensor, letters: Tensor) -> Tensor:
    """Connectionist temporal classification."""
    scores = model(x).float().log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(scores, y, frames, letters, zero_infinity=True)


def _gpt() -> Any:
    path = Path(__file__).parents[2] / "examples" / "gpt.py"
    spec = importlib.util.spec_from_file_location("example_gpt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def gpt() -> nn.Module:
    """The GPT of the examples, its head tied to its embedding."""
    module = _gpt()
    model = module.GPT(module.GPTConfig(30, 12, 16, 2, 2))
    model.head.weight = model.tokens.weight
    return model


CASES: dict[str, Case] = {
    "mlp": Case(mlp, lambda n: (torch.randn(n, 10), torch.randint(0, 4, (n,))), classify),
    "cnn": Case(CNN, images(1, 12, 4), classify, zero=("conv1.bias",)),
    "convs": Case(
        Convs, lambda n: (torch.randn(n, 2, 13, 12), torch.randint(0, 3, (n,))), classify
    ),
    "gpt": Case(gpt, tokens(30, 12), own_loss),
    "encoder": Case(Encoder, padded, classify),
    "vit": Case(ViT, images(3, 16, 5), classify),
    "lstm": Case(LSTM, tokens(20, 5), next_token),
    "unet": Case(UNet, pictures, regress),
    "speech": Case(Speech, spoken, transcribe),
    "cnn with dropout": Case(
        lambda: CNN(0.3), images(1, 12, 4), classify, draws=True, zero=("conv1.bias",)
    ),
    "encoder with dropout": Case(lambda: Encoder(0.1), padded, classify, draws=True),
}
