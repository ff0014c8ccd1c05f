"""A digit classifier: exported from torch once, then trained by onnxruntime, without torch.

    python finetune_digits.py [FOLDER]

FOLDER keeps what ``on_device.py`` and ``on_device.mjs`` train from.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from finetune import folder_of, train_both_ways
from sklearn.datasets import load_digits
from torch import nn

import mpgraph

EPOCHS = 4


def digits():
    """Handwritten digits, 8 by 8 pixels: 1437 in four shuffled epochs, and 360 to test with."""
    found = load_digits()
    x, y = (found.images[:, None] / 16).astype(np.float32), found.target.astype(np.int64)
    random = np.random.default_rng(0)
    known, new = np.split(random.permutation(len(x)), [1437])
    taken = np.concatenate([random.permutation(known) for _ in range(EPOCHS)])
    return {"x": x[taken], "y": y[taken]}, {"x": x[new], "y": y[new]}


def make_step():
    """A small convolutional network in bf16, with batch norm and dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss_fn(model, x, y):
        scores = model(x).float()
        accuracy = (scores.argmax(1) == y).float().mean()
        return {"loss": F.cross_entropy(scores, y), "accuracy": accuracy}

    return mpgraph.TrainStep(model, optimizer, loss_fn, precision="bf16", compile=False)


if __name__ == "__main__":
    with folder_of(sys.argv[1:]) as folder:
        train_both_ways(make_step(), *digits(), folder)
