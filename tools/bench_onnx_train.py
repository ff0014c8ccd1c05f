"""Time a training step in onnxruntime ÷ the same step in torch, in one run.

    python tools/bench_onnx_train.py [--models gpt mlp-wide] [--precision fp32 bf16]
                                     [--steps 30] [--threads 1] [--device cuda]
                                     [--profile] [--out PATH]

Three ways from the same weights, with the same batch, take their steps in turn, the order changing
from step to step: an exported step in ``mpgraph.runtime.OnnxTrainer``; torch in eager mode; and
``torch.compile``. Both of torch have a fused AdamW, and in 16 bit ``torch.autocast`` (in fp16 with
``GradScaler``). Exporting, compiling and warm-up stay apart. A ratio is the median of the ratios of
neighbouring steps, with quartiles.

Memory is measured in a process of its own, which has no torch: how much more is resident at the
peak of a step than before the folder was opened, ÷ the size of the state (parameters and moments in
fp32). On a GPU it is not measured, and the step is exported with ``target="cuda"``.

Writes ``<out>.json`` and ``<out>.md``; with ``--profile`` the former also says where onnxruntime
spends its time, by operator, and what the CPU runs.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch._functorch.config
from bench import Step, Ways, in_turns, ratio
from bench_counts import peak_bytes
from bench_eager import DTYPES, machine, write
from bench_report import line
from rich.console import Console
from rich.markdown import Markdown

import mpgraph
from mpgraph.runtime import OnnxTrainer

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("mlp", "mlp-wide", "resnet", "gpt", "bert")
ONNX, EAGER, COMPILED = "onnxruntime", "torch eager", "torch.compile"
# By peer: what the time of a step in fp32 is to be at most; and its memory ÷ its state.
GOALS = {EAGER: 0.8, COMPILED: 1.2}
MEMORY_GOAL = 1.7


class TrainWays(Ways):
    """Torch's ways to run one step, and an exported one."""

    def eager(self) -> Step:
        """Eager mode, under ``torch.autocast`` in 16 bit."""
        return self._step(copy.deepcopy(self.model), DTYPES.get(self.precision))

    def compiled(self) -> Step:
        """The same, compiled."""
        model = copy.deepcopy(self.model)
        return self._step(model, DTYPES.get(self.precision), torch.compile(model))

    def exported(self, folder: Path, threads: int, verify: bool) -> tuple[Step, float]:
        """A step of the exported folder, and the processor's seconds that exporting has taken."""
        model = copy.deepcopy(self.model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        step = mpgraph.TrainStep(model, optimizer, self.loss, precision=self.precision)
        started = time.process_time()
        step.export_onnx(folder, example_inputs=self.batch, verify=verify, target=self.device)
        seconds = time.process_time() - started
        trainer = OnnxTrainer(folder, threads=threads)
        batch = _arrays(trainer.inputs, self.batch)
        return lambda: trainer.step(**batch)["loss"], seconds


def measure(name: str, precision: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One model in one precision."""
    torch._dynamo.reset()
    subject = TrainWays(name, options.device, precision)
    exported, export_seconds = subject.exported(folder, options.threads, not options.no_verify)
    made = {ONNX: exported, EAGER: subject.eager(), COMPILED: subject.compiled()}
    losses = {way: torch.as_tensor(step()).item() for way, step in made.items()}
    for step in made.values():
        step(), step()
    seconds = in_turns(made, options.steps, f"{name} {precision}", options.device)
    state = 3 * 4 * sum(p.numel() for p in subject.model.parameters())
    return {
        "model": name,
        "precision": precision,
        "parameters": state // 12,
        "state_bytes": state,
        "first_losses": losses,
        "export_seconds": export_seconds,
        "memory_bytes": _memory(made, state, folder, subject, options.threads),
        "seconds": seconds,
        "ratios": {peer: ratio(seconds[ONNX], seconds[peer]) for peer in GOALS},
        "profile": profile(folder, subject.batch, options.threads) if options.profile else {},
    }


def _memory(
    made: dict[str, Step], state: int, folder: Path, subject: TrainWays, threads: int
) -> dict[str, int]:
    if subject.device != "cpu":
        return {}
    found = {way: state + peak_bytes(made[way], "cpu") for way in (EAGER, COMPILED)}
    return {ONNX: memory(folder, subject.batch, threads), **found}


# Takes a folder, a file of arrays and a number of threads; prints by how many bytes it grew.
_MEMORY = """
import json, re, sys
import numpy as np
from mpgraph.runtime import OnnxTrainer

def resident(what):
    return 1024 * int(re.search(rf"{what}:\\s+(\\d+)", open("/proc/self/status").read())[1])

folder, arrays, threads = sys.argv[1:]
batch = dict(np.load(arrays))
before = resident("VmRSS")
trainer = OnnxTrainer(folder, threads=int(threads))
for _ in range(3):
    trainer.step(**batch)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of loading
trainer.step(**batch)
assert "torch" not in sys.modules
print(json.dumps(resident("VmHWM") - before))
"""


def memory(folder: Path, batch: Any, threads: int) -> int:
    """By how many bytes a process without torch has grown while a step runs, state included."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        _save(Path(file.name), folder, batch)
        command = [sys.executable, "-c", _MEMORY, str(folder), file.name, str(threads)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return int(json.loads(printed.stdout))


def _save(path: Path, folder: Path, batch: Any) -> None:
    import numpy as np

    manifest = json.loads((folder / "manifest.json").read_text())
    names = [tensor["name"] for tensor in manifest["graphs"]["train_step.onnx"]["inputs"]]
    np.savez(path, **_arrays(names, batch))


def _arrays(names: Iterable[str], batch: Any) -> Any:
    return {n: v.cpu().contiguous().numpy() for n, v in zip(names, batch, strict=True)}


def profile(folder: Path, batch: Any, threads: int) -> dict[str, float]:
    """The share of a step's kernels that each operator takes, the largest first."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.intra_op_num_threads = True, threads
    options.log_severity_level = 3
    options.profile_file_prefix = str(folder / "profile")
    trainer = OnnxTrainer(folder)
    session = onnxruntime.InferenceSession(
        str(folder / "train_step.onnx"), options, providers=trainer._providers
    )
    feeds = _feeds(trainer, folder, batch)
    for _ in range(5):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    spent: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            provider = event["args"].get("provider", "")
            where = " (CPU)" * (trainer._device == "cuda" and provider.startswith("CPU"))
            spent[event["args"]["op_name"] + where] += event["dur"]
    total = sum(spent.values())
    return {name: round(micro / total, 4) for name, micro in spent.most_common(12)}


def _feeds(trainer: OnnxTrainer, folder: Path, batch: Any) -> dict[str, Any]:
    import numpy as np
    from safetensors.numpy import load_file

    feeds: dict[str, Any] = {**load_file(folder / "state.safetensors")}
    if (folder / "frozen.safetensors").exists():
        feeds |= load_file(folder / "frozen.safetensors")
    for number in trainer.manifest.numbers:
        feeds[number.name] = np.array(number.value, dtype=number.dtype)
    feeds |= _arrays(trainer.inputs, batch)
    graph = trainer.manifest.graphs["train_step.onnx"]
    for tensor in trainer.manifest.state:
        if tensor.pieces:
            feeds[tensor.name] = feeds[tensor.name].reshape(tensor.pieces)
    known = {*graph.reads, *trainer.inputs, *(n.name for n in trainer.manifest.numbers)}
    return {name: value for name, value in feeds.items() if name in known}


_HEADS = (
    "model", "precision", "onnxruntime, ms", "÷ torch eager", "÷ torch.compile",
    "memory ÷ state", "the same, eager", "export, CPU s", "first loss, onnxruntime / eager",
)  # fmt: skip


def page(record: dict[str, Any]) -> str:
    """The record as a page."""
    facts = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    lines = [
        "# A training step in onnxruntime",
        "",
        f"`{record['command']}`: {record['steps']} steps in turn, medians, quartiles in brackets. "
        f"Measured on: {facts}, onnxruntime {record['onnxruntime']}.",
        "",
        line(_HEADS),
        line(["---"] * len(_HEADS)),
        *(line(_cells(row)) for row in record["rows"]),
        "",
        f"Goals in fp32: {' and '.join(f'{g} of {peer}' for peer, g in GOALS.items())}; memory "
        f"{MEMORY_GOAL} × state. Bold figures miss them.",
    ]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    losses = row["first_losses"]
    return [
        row["model"],
        row["precision"],
        f"{1e3 * statistics.median(row['seconds'][ONNX]):.1f}",
        *(_figure(row, peer) for peer in GOALS),
        *_memory_cells(row),
        f"{row['export_seconds']:.1f}",
        f"{losses[ONNX]:.4f} / {losses[EAGER]:.4f}",
    ]


def _memory_cells(row: dict[str, Any]) -> list[str]:
    if not row["memory_bytes"]:
        return ["–", "–"]
    used, eager = (row["memory_bytes"][way] / row["state_bytes"] for way in (ONNX, EAGER))
    return [f"**{used:.2f}**" if used > MEMORY_GOAL else f"{used:.2f}", f"{eager:.2f}"]


def _figure(row: dict[str, Any], peer: str) -> str:
    found = row["ratios"][peer]
    missed = row["precision"] == "fp32" and found["median"] > GOALS[peer]
    middle = f"**{found['median']:.2f}**" if missed else f"{found['median']:.2f}"
    return f"{middle} [{found['low']:.2f} – {found['high']:.2f}]"


def main() -> None:
    """Measure, print the page, keep the raw figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-verify", action="store_true", help="export without its check")
    parser.add_argument("--profile", action="store_true", help="note onnxruntime's operators too")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/onnx-training")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._functorch.config.enable_autograd_cache = False
    record: dict[str, Any] = {
        "command": f"python tools/bench_onnx_train.py --steps {options.steps}",
        "machine": machine(options.device),
        "onnxruntime": onnxruntime.__version__,
        "steps": options.steps,
        "rows": [],
    }
    for precision in options.precision:
        for name in options.models:
            with tempfile.TemporaryDirectory() as folder:
                record["rows"].append(measure(name, precision, options, Path(folder)))
            write(options.out.with_suffix(".json"), record)
            options.out.with_suffix(".md").write_text(page(record))
    Console(width=160).print(Markdown(page(record)))


if __name__ == "__main__":
    main()
