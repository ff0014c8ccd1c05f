"""Small models of every kind that is exported, each with a call."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from gpt import GPT, GPTConfig


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))


class ConvNet(nn.Module):
    """BatchNorm, pooling, depthwise, dilated, strided and transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, groups=8, dilation=2, padding=2), nn.BatchNorm2d(16), nn.SiLU(),
            nn.ConvTranspose2d(16, 8, 3, stride=2, output_padding=1), nn.Hardswish(),
            nn.Conv2d(8, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5),
            nn.Linear(8, 10),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)

    def forward(self, x):
        return self.layers(x)


class BatchStatistics(nn.Module):
    """Norms that use the batch's own statistics in eval mode too."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.batch = nn.BatchNorm2d(8, track_running_stats=False)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.group = nn.GroupNorm(2, 8)

    def forward(self, x):
        return self.group(self.instance(self.batch(self.conv(x)).relu())).relu().mean((2, 3))


def language_model():
    """examples/gpt.py, returning logits."""
    return GPT(GPTConfig(vocabulary=50, context=32, width=32, layers=1, heads=2))


class Encoder(nn.Module):
    """Like BERT: bidirectional, with a padding mask, several named results."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return {"logits": self.head(hidden[:, 0]), "hidden": hidden}


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 16, 32))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, 2, batch_first=True)
        self.head = nn.Linear(24, 50)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0])


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(1, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, 2, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.leave = nn.Conv2d(24, 2, 1)

    def forward(self, x):
        wide = F.gelu(self.enter(x))
        deep = F.silu(self.norm(self.down(wide)))
        larger = F.interpolate(deep, scale_factor=2.0, mode="nearest")[:, :8]
        return self.leave(torch.cat([wide, self.up(deep), larger], 1))


def tokens(batch, length=7):
    return torch.randint(0, 50, (batch, length))


def padded(batch, length=7):
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, -2:] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


# Model, its call for a batch size, and whether the batch size may vary in its file.
MODELS = {
    "mlp": (MLP, lambda n: (torch.randn(n, 8),)),
    "cnn": (ConvNet, lambda n: (torch.randn(n, 3, 16, 16),)),
    "batch-statistics": (BatchStatistics, lambda n: (torch.randn(n, 3, 8, 8),)),
    "gpt": (language_model, lambda n: (tokens(n),)),
    "encoder": (Encoder, padded),
    "vit": (VisionTransformer, lambda n: (torch.randn(n, 3, 16, 16),)),
    "lstm": (Recurrent, lambda n: (tokens(n),)),
    "unet": (UNet, lambda n: (torch.randn(n, 1, 16, 16),)),
}
