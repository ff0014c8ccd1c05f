"""Run the recorded steps of an exported folder here, and compare them with torch's.

mpgraph verify finetune/
"""

from __future__ import annotations

import argparse
import dataclasses
import json

HELP = "whether this device trains as torch did when the folder was exported"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("folder", metavar="FOLDER", help="what step.export_onnx has written")
    parser.add_argument("--provider", action="append", help="an execution provider of onnxruntime")
    parser.add_argument("--threads", type=int, help="how many threads a step may use")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Compare, and say how it went; 1 where the losses differ."""
    from mpgraph.runtime import OnnxTrainer
    from mpgraph.runtime.verify import verify

    trainer = OnnxTrainer(options.folder, providers=options.provider, threads=options.threads)
    found = verify(trainer)
    if options.json:
        print(json.dumps({**dataclasses.asdict(found), "is_right": found.is_right}, indent=1))
        return 0 if found.is_right else 1
    for index, (loss, expected) in enumerate(zip(found.losses, found.expected, strict=True), 1):
        print(f"step {index}: loss {loss:.6f}, torch {expected:.6f}")
    print(f"losses differ by {found.loss_error:.1e} at most; allowed are {found.tolerance:.0e}")
    print(f"norms of the state differ by {found.state_error:.1e} at most ({found.state})")
    return 0 if found.is_right else 1
