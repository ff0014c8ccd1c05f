"""Trains from an exported folder: what runs on a device, without torch.

    python on_device.py FOLDER

FOLDER holds ``step/``, as ``step.export_onnx`` wrote it, and the rows to train with and to test
with, an array for each input of the step. ``on_device.mjs`` does the same in JavaScript.
"""

import json
import sys
from pathlib import Path

from safetensors.numpy import load_file

from mpgraph.runtime import OnnxTrainer, batches_of

BATCH = 32


def shown(name, results):
    """One line: what has trained, and what it reached."""
    return f"{name}: loss {results['loss']:.3f}, accuracy {results['accuracy']:.3f}"


def main(folder):
    """Take the rows in their order, write the losses, print what is reached on the test."""
    train, test = (load_file(folder / f"{part}.safetensors") for part in ("train", "test"))
    trainer = OnnxTrainer(folder / "step")
    history = trainer.fit([*batches_of(train, BATCH)], progress=False)
    losses = [result["loss"] for result in history]
    (folder / "losses-onnxruntime.json").write_text(json.dumps(losses))
    assert "torch" not in sys.modules
    print(shown("onnxruntime", trainer.evaluate([test])))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
