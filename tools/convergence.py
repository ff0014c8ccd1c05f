"""Train to the end in fp32, bf16 and fp16, over several seeds, and compare what comes out.

    python tools/convergence.py [--device cuda] [--seeds 3] [--json FILE] [--plot FILE]

Two models on real data: the GPT of the demo on the manual that ships with Python, byte by byte,
and a small ResNet on the handwritten digits of scikit-learn. For every seed the three precisions
start from the same weights and see the same batches. bf16 and fp16 are what ``mpgraph.convert``
makes of the model; fp16 steps through ``mpgraph.guard``.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import mpgraph
from mpgraph.whole_files import write_whole

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from bench_eager import Residual
from gpt import GPT, GPTConfig
from gpt_text import english, training_batches, validation_batches

PRECISIONS = ("fp32", "bf16", "fp16")
Batch = tuple[Tensor, Tensor]
Record = dict[str, Any]


class Task:
    """A model, its data, and the figure by which a training run is judged."""

    name: str
    metric: str
    steps: int

    def model(self) -> nn.Module:
        """A model with random weights."""
        raise NotImplementedError

    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches without end."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer, at its highest learning rate."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss, one number."""
        raise NotImplementedError

    def score(self, model: nn.Module) -> float:
        """The metric on data that no batch holds."""
        raise NotImplementedError


class Language(Task):
    """Predict the next byte of English text."""

    name, metric, steps = "GPT, 3.3 M parameters", "validation loss, nats per byte", 800

    def __init__(self, device: torch.device) -> None:
        self.config = GPTConfig()
        self.training, held_back = english(device)
        self.validation = validation_batches(held_back, self.config.context, 24)

    def model(self) -> nn.Module:
        """Return the model with random weights."""
        return GPT(self.config)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield training batches without end."""
        return training_batches(self.training, self.config.context, 24, seed)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer, at its highest learning rate."""
        return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the training loss of a batch."""
        loss: Tensor = model(*batch)
        return loss

    def score(self, model: nn.Module) -> float:
        """Return the metric on the held-back data."""
        return statistics.fmean(model(*batch).item() for batch in self.validation)


class Digits(Task):
    """Tell handwritten digits of 8 × 8 pixels apart."""

    name, metric, steps = "ResNet on digits", "test error, %", 800

    def __init__(self, device: torch.device) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32, device=device)[:, None] / 16
        labels = torch.tensor(data.target, device=device)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
        self.test, self.train = order[:360], order[360:]
        self.images, self.labels = images, labels

    def model(self) -> nn.Module:
        """Return the model with random weights."""
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1), Residual(32, 64, 2), Residual(64, 64, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield training batches without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator).to(self.train.device)
            for picked in self.train[order].split(64)[:-1]:
                yield self.images[picked], self.labels[picked]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer, at its highest learning rate."""
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the training loss of a batch."""
        images, labels = batch
        return F.cross_entropy(model(images).float(), labels)

    def score(self, model: nn.Module) -> float:
        """Return the metric on the held-back data."""
        guessed = model(self.images[self.test]).argmax(-1)
        return 100 * (guessed != self.labels[self.test]).float().mean().item()


def train(task: Task, start: nn.Module, precision: str, seed: int, steps: int) -> Record:
    """One training run: its scores along the way, and what fp16 skipped."""
    model = copy.deepcopy(start)
    if precision != "fp32":
        model = mpgraph.convert(model, precision)
    optimizer = task.optimizer(model)
    if precision == "fp16":
        mpgraph.guard(optimizer, model)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=steps, cycle_momentum=False
    )
    curve: list[tuple[int, float]] = []
    skipped = torch.zeros((), device=next(model.parameters()).device)
    batches = task.batches(seed)
    title = f"{task.name}, {precision}, seed {seed}"
    for step in track(range(1, steps + 1), title, transient=True):
        task.loss(model, next(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        skipped += torch.as_tensor(getattr(optimizer, "last_step_skipped", False)).to(skipped)
        if step % (steps // 10) == 0:
            curve.append((step, evaluate(task, model)))
    return {
        "task": task.name, "precision": precision, "seed": seed, "curve": curve,
        "final": curve[-1][1], "skipped": int(skipped.item()),
    }  # fmt: skip


@torch.no_grad()
def evaluate(task: Task, model: nn.Module) -> float:
    """The task's metric, computed in the model's own precision."""
    model.eval()
    score = task.score(model)
    model.train()
    return score


def summary(task: Task, records: list[Record]) -> Table:
    """Mean and standard deviation over the seeds, one row for each precision."""
    table = Table(title=f"{task.name}: {task.metric}", title_justify="left")
    for heading in ("precision", "each seed", "mean", "deviation", "minus fp32", "skipped steps"):
        table.add_column(heading, justify="left" if heading == "precision" else "right")
    base: list[float] = []
    for precision in PRECISIONS:
        runs = [r for r in records if r["task"] == task.name and r["precision"] == precision]
        finals = [run["final"] for run in runs]
        base = base or finals
        table.add_row(
            precision,
            ", ".join(f"{final:.3f}" for final in finals),
            f"{statistics.fmean(finals):.3f}",
            f"{statistics.stdev(finals):.3f}" if len(finals) > 1 else "–",
            f"{statistics.fmean(finals) - statistics.fmean(base):+.3f}",
            ", ".join(str(run["skipped"]) for run in runs),
        )
    return table


def draw(path: Path, tasks: list[Task], records: list[Record]) -> None:
    """The scores along the way: a colour for each precision, a line for each seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for colour, precision in zip(("black", "tab:blue", "tab:orange"), PRECISIONS, strict=True):
            runs = [r for r in records if r["task"] == task.name and r["precision"] == precision]
            for number, run in enumerate(runs):
                steps, scores = zip(*run["curve"], strict=True)
                label = precision if number == 0 else None
                axis.plot(steps, scores, color=colour, linewidth=1, alpha=0.8, label=label)
        axis.set(title=task.name, xlabel="step", ylabel=task.metric, yscale="log")
        axis.legend()
    figure.tight_layout()
    write_whole(path, lambda partial: figure.savefig(partial, dpi=120))


def main() -> None:
    """Train, print the tables, write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps of every run, instead of each task's own")
    parser.add_argument("--tasks", nargs="+", choices=["gpt", "digits"], default=["gpt", "digits"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    kinds: dict[str, Callable[[torch.device], Task]] = {"gpt": Language, "digits": Digits}
    tasks = [kinds[name](device) for name in options.tasks]
    console = Console()
    records = []
    for task in tasks:
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            start = task.model().to(device)
            for precision in PRECISIONS:
                records.append(train(task, start, precision, seed, options.steps or task.steps))
        console.print(summary(task, records))
    on_cuda = device.type == "cuda"
    made = {
        "device": torch.cuda.get_device_name() if on_cuda else platform.processor(),
        "torch": torch.__version__,
        "runs": records,
    }
    if options.json:
        text = json.dumps(made, indent=1) + "\n"
        write_whole(options.json, lambda partial: partial.write_text(text))
    if options.plot:
        draw(options.plot, tasks, records)


if __name__ == "__main__":
    main()
