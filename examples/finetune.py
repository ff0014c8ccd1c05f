"""One exported step, trained twice on the same batches: in torch, and without it."""

import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from on_device import BATCH, shown
from safetensors.numpy import save_file

from mpgraph.runtime import batches_of

ON_DEVICE = Path(__file__).with_name("on_device.py")


def folder_of(arguments):
    """The folder that a command line names, or one that is gone at the end."""
    return nullcontext(arguments[0]) if arguments else tempfile.TemporaryDirectory()


def train_both_ways(step, train, test, folder):
    """Export a step, train it here and by ``on_device.py``, and print what each reached.

    Args:
        step: A TrainStep whose loss function returns "loss" and "accuracy".
        train: Arrays by name, with the rows to train on in the order in which they are taken.
        test: The same, to measure with.
        folder: What the other process reads and writes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(train, folder / "train.safetensors")
    save_file(test, folder / "test.safetensors")
    batches = [tensors(batch) for batch in batches_of(train, BATCH)]
    exported = step.export_onnx(folder / "step", example_inputs=batches[0])
    print(f"exported: one step differs from torch by {exported.error:.1e} at most")
    print(shown("at first", measured(step, test)))
    for batch in batches:
        step(**batch)
    print(shown("torch", measured(step, test)), flush=True)
    subprocess.run([sys.executable, ON_DEVICE, folder], check=True)


def measured(step, arrays):
    """What the loss function of a step says of these rows, in evaluation mode."""
    step.model.eval()
    with torch.no_grad():
        results = step.loss_fn(step.model, **tensors(arrays))
    step.model.train()
    return results


def tensors(arrays):
    """The same rows as tensors."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
