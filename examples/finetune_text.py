"""A small GPT that has read English learns Python by adapters: in torch, then without torch.

    python finetune_text.py [FOLDER]

What it knew stays frozen, so the exported step has a backward for the adapters alone. FOLDER keeps
what ``on_device.py`` and ``on_device.mjs`` train from.
"""

import argparse
import ast
import difflib
import inspect
import sys
import typing

import torch
import torch.nn.functional as F
from finetune import folder_of, train_both_ways
from gpt import GPT, GPTConfig
from gpt_text import english, training_batches, validation_batches
from on_device import BATCH
from torch import nn

import mpgraph

CONFIG = GPTConfig(context=32, width=64, layers=1)
ENGLISH_STEPS, PYTHON_STEPS, RANK = 400, 100, 8


class Adapted(nn.Module):
    """A frozen linear layer, and two thin ones beside it that learn what to add (LoRA)."""

    def __init__(self, linear):
        super().__init__()
        self.frozen = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)  # at first it adds nothing

    def forward(self, x):
        """The sum of both."""
        return self.frozen(x) + self.up(self.down(x))


def reader_of_english():
    """A GPT that has read some of the manual that ships with Python."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text, _ = english(torch.device("cpu"))
    batches = training_batches(text, CONFIG.context, BATCH, seed=0)
    for _ in range(ENGLISH_STEPS):
        model(*next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def adapt(model):
    """Freeze a GPT, and give adapters to two linear layers of each block."""
    model.requires_grad_(False)
    for block in model.blocks:
        block.attention.qkv = Adapted(block.attention.qkv)
        block.mlp[2] = Adapted(block.mlp[2])
    return model


def make_step(model):
    """A step in bf16 that trains what is not frozen."""
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=3e-3)

    def loss_fn(model, tokens, targets):
        logits = model(tokens).float().flatten(0, 1)
        accuracy = (logits.argmax(1) == targets.flatten()).float().mean()
        return {"loss": F.cross_entropy(logits, targets.flatten()), "accuracy": accuracy}

    return mpgraph.TrainStep(model, optimizer, loss_fn, precision="bf16", compile=False)


def python_code():
    """Windows of some modules of the standard library; another module to test with."""
    known, new = source_of(argparse, ast, inspect, typing), source_of(difflib)
    batches = training_batches(known, CONFIG.context, BATCH, seed=1)
    train = [next(batches) for _ in range(PYTHON_STEPS)]
    return rows(train), rows(validation_batches(new, CONFIG.context, BATCH))


def source_of(*modules):
    """The source code of modules as bytes."""
    text = "\n".join(inspect.getsource(module) for module in modules)
    return torch.tensor(list(text.encode()))


def rows(batches):
    """Batches as arrays, one below the other."""
    tokens, targets = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
    return {"tokens": tokens, "targets": targets}


if __name__ == "__main__":
    with folder_of(sys.argv[1:]) as folder:
        train_both_ways(make_step(adapt(reader_of_english())), *python_code(), folder)
