"""A digit classifier: exported from torch once, then trained by onnxruntime, without torch."""

import subprocess
import sys
import tempfile
from pathlib import Path

TRAINING = """
import sys

import numpy as np

from mpgraph.runtime import OnnxTrainer, batches_of

folder, data = sys.argv[1:]
arrays = np.load(data)
train, test = ({"x": arrays[f"{part}_x"], "y": arrays[f"{part}_y"]} for part in ("train", "test"))
trainer = OnnxTrainer(folder)
for epoch in range(4):
    trainer.fit([*batches_of(train, 64, seed=epoch)])
right = trainer.predict(input=test["x"])["output"].argmax(1) == test["y"]
assert "torch" not in sys.modules
print(f"onnxruntime: accuracy {right.mean():.3f}")
"""


def digits():
    """Handwritten digits, 8 by 8 pixels: 1437 to train with, 360 to test."""
    import numpy as np
    from sklearn.datasets import load_digits

    found = load_digits()
    x = (found.images[:, None] / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], found.target[order].astype(np.int64)
    return {"train_x": x[:1437], "train_y": y[:1437], "test_x": x[1437:], "test_y": y[1437:]}


def make_step():
    """A small convolutional network in bf16, with batch norm and dropout."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    import mpgraph

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss_fn(model, x, y):
        return F.cross_entropy(model(x).float(), y)

    return mpgraph.TrainStep(model, optimizer, loss_fn, precision="bf16", compile=False)


def train_in_torch(step, arrays):
    """The same four epochs; how many digits of the test are right."""
    import torch

    from mpgraph.runtime import batches_of

    train = {"x": arrays["train_x"], "y": arrays["train_y"]}
    for epoch in range(4):
        for batch in batches_of(train, 64, seed=epoch):
            step(torch.from_numpy(batch["x"]), torch.from_numpy(batch["y"]))
    step.model.eval()
    with torch.no_grad():
        scores = step.model(torch.from_numpy(arrays["test_x"]))
    return (scores.argmax(1).numpy() == arrays["test_y"]).mean()


def main():
    """Export, then train here and in a process of its own."""
    import numpy as np
    import torch

    arrays = digits()
    step = make_step()
    with tempfile.TemporaryDirectory() as name:
        folder, data = Path(name) / "digits", Path(name) / "data.npz"
        example = torch.from_numpy(arrays["train_x"][:64]), torch.from_numpy(arrays["train_y"][:64])
        exported = step.export_onnx(folder, example_inputs=example)
        print(f"exported: one step differs from torch by {exported.error:.1e} at most")
        np.savez(data, **arrays)
        print(f"torch: accuracy {train_in_torch(step, arrays):.3f}", flush=True)
        subprocess.run([sys.executable, "-c", TRAINING, str(folder), str(data)], check=True)


if __name__ == "__main__":
    main()
