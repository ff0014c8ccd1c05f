"""Train from an exported folder with onnxruntime.

mpgraph finetune finetune/ --data train.npz --epochs 3 --batch-size 32 --save tuned.safetensors
"""

from __future__ import annotations

import argparse
import json
from typing import Any

HELP = "train from a folder that step.export_onnx has written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("folder", metavar="FOLDER", help="what step.export_onnx has written")
    parser.add_argument("--data", required=True, help="an .npz file: an array for each input")
    parser.add_argument("--eval-data", help="another, to evaluate on after each epoch")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, help="the learning rate; as exported by default")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data")
    parser.add_argument("--resume", help="a checkpoint to go on from")
    parser.add_argument("--save", help="where to write a checkpoint after each epoch")
    parser.add_argument("--provider", action="append", help="an execution provider of onnxruntime")
    parser.add_argument("--threads", type=int, help="how many threads a step may use")
    parser.add_argument("--json", action="store_true", help="print JSON, and no progress")


def run(options: argparse.Namespace) -> int:
    """Train, and say how each epoch went."""
    from mpgraph.runtime import OnnxTrainer

    trainer = OnnxTrainer(options.folder, providers=options.provider, threads=options.threads)
    if options.resume:
        trainer.load(options.resume)
    if options.lr is not None:
        trainer.lr = options.lr
    epochs = [_epoch(trainer, options, epoch) for epoch in range(options.epochs)]
    if options.json:
        print(json.dumps({"steps": trainer.steps, "epochs": epochs}, indent=1))
    return 0


def _epoch(trainer: Any, options: argparse.Namespace, epoch: int) -> dict[str, Any]:
    from mpgraph.runtime import batches_of

    arrays = _arrays(options.data, trainer)
    batches = [*batches_of(arrays, options.batch_size, seed=options.seed + epoch)]
    history = trainer.fit(batches, progress=not options.json)
    losses = [record["loss"] for record in history]
    found: dict[str, Any] = {
        "loss": sum(losses) / len(losses),
        "skipped": sum(record["skipped"] for record in history),
    }
    if options.eval_data:
        others = batches_of(_arrays(options.eval_data, trainer), options.batch_size)
        found["evaluation"] = trainer.evaluate(others)
    if options.save:
        trainer.save(options.save)
    if not options.json:
        print(f"epoch {epoch + 1}: {_text(found, len(losses))}")
    return found


def _arrays(path: str, trainer: Any) -> dict[str, Any]:
    import numpy as np

    from mpgraph.runtime import BatchError

    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise BatchError(f"{path} cannot be read as an .npz file: {error}") from error
    missing = [name for name in trainer.inputs if name not in arrays]
    if missing:
        raise BatchError(
            f"{path} holds {', '.join(arrays) or 'nothing'}; the step also needs "
            f"{', '.join(missing)}. Save them by these names: numpy.savez(path, {missing[0]}=...)."
        )
    return {name: arrays[name] for name in trainer.inputs}


def _text(found: dict[str, Any], steps: int) -> str:
    """What came of an epoch, on a line."""
    line = f"training loss {found['loss']:.4f} (mean of {steps} steps, {found['skipped']} skipped)"
    others = found.get("evaluation", {})
    return line + "".join(f", evaluation {name} {value:.4f}" for name, value in others.items())
