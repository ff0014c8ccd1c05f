"""Train a small GPT in fp32, under torch.autocast and converted by mpgraph, side by side.

All three start from the same weights and see the same batches of the same text: the manual
that ships with Python. They take their steps in turn, in one process, so that whatever else the
machine is doing falls on each of them alike. Results go to a table, a picture and a JSON file.

Run it with ``make demo`` or ``python examples/demo.py --help``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from demo_plot import draw_losses
from gpt import GPT, GPTConfig
from gpt_text import english, training_batches, validation_batches
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mpgraph

BATCH, SMALL_BATCH = 12, 4
LEARNING_RATE = 1e-3
UNTIMED_STEPS = 5  # capture, allocator and thread pools settle in the first few
WARMUP_STEPS = 20  # over which the learning rate rises from nothing
MOST_STEPS, FEWEST_STEPS = 200, 60
RATIO = (
    "relative to autocast: the median of the ratios of steps taken one after the other, in which "
    "whatever else the machine does cancels; the medians above are over all steps, so their ratio "
    "is another number."
)


class CastCounter(TorchDispatchMode):
    """Counts the conversions between floating-point dtypes that run inside it.

    It watches the operators that reach the device, so it sees torch.autocast's hidden casts
    and a converted model's written ones alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.casts = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func``, and count it if it is a cast."""
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            (source,) = args
            self.casts += source.is_floating_point() and source.dtype != result.dtype
        return result


@dataclass
class Loop:
    """One way to train: a model, its optimizer, the context its forward runs in, its record."""

    name: str
    model: GPT
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    casts: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, start_factor=1 / WARMUP_STEPS, total_iters=WARMUP_STEPS
        )

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        """One optimizer step, timed."""
        synchronize(tokens.device)
        start = time.perf_counter()
        with self.context():
            loss = self.model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        synchronize(tokens.device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    @torch.no_grad()
    def validate(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Note the loss on ``batches``, computed in this loop's own precision."""
        self.model.eval()
        with self.context():
            losses = [self.model(tokens, targets).item() for tokens, targets in batches]
        self.model.train()
        self.validation.append((len(self.losses), statistics.fmean(losses)))

    def count_casts(self, tokens: Tensor, targets: Tensor) -> None:
        """Note how many casts one forward pass runs."""
        with CastCounter() as counter, self.context():
            self.model(tokens, targets)
        self.casts = counter.casts

    @property
    def timed(self) -> list[float]:
        """The step times without the first few, in milliseconds."""
        return [1e3 * seconds for seconds in self.seconds[UNTIMED_STEPS:] or self.seconds]


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done all that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_loops(config: GPTConfig, device: torch.device, seed: int) -> list[Loop]:
    """The three ways to train, from the same initial weights."""
    torch.manual_seed(seed)
    model = GPT(config).to(device)
    return [
        Loop("fp32", copy.deepcopy(model)),
        Loop(
            "autocast bf16",
            copy.deepcopy(model),
            lambda: torch.autocast(device.type, torch.bfloat16),
        ),
        Loop("mpgraph bf16", mpgraph.convert(copy.deepcopy(model), "bf16")),
    ]


def affordable_steps(loops: list[Loop], minutes: float) -> tuple[int, float]:
    """How many steps of every loop fit into so many minutes, going by the steps so far.

    And how many minutes they take: there is a least number of steps, whatever time that is.
    """
    rounds = [sum(seconds) for seconds in zip(*(loop.seconds for loop in loops), strict=True)]
    spent, each = sum(rounds), statistics.median(rounds[UNTIMED_STEPS:])
    fitting = len(rounds) + int((60 * minutes - spent) / each)
    steps = max(FEWEST_STEPS, min(MOST_STEPS, fitting))
    return steps, (spent + (steps - len(rounds)) * each) / 60


def train(loops: list[Loop], config: GPTConfig, batch: int, options: argparse.Namespace) -> None:
    """Let the loops take their steps in turn, with a look at the validation text now and then.

    Without a number of steps, the first few decide how many there is time for.
    """
    steps: int | None = options.steps
    training, held_back = english(options.device)
    batches = training_batches(training, config.context, batch, options.seed)
    validation = validation_batches(held_back, config.context, batch)
    columns = (
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss: {task.fields[losses]}"),
    )
    with Progress(*columns) as progress:
        total = steps or MOST_STEPS
        progress.print("validation loss" + "".join(f"{loop.name:>15}" for loop in loops))
        bar = progress.add_task("", total=total, losses="")
        for done in itertools.count(1):
            tokens, targets = next(batches)
            # A different loop begins each round: none always runs on another's warm caches.
            for shift in range(len(loops)):
                loops[(done + shift) % len(loops)].step(tokens, targets)
            losses = ", ".join(f"{loop.name.split()[0]} {loop.losses[-1]:.3f}" for loop in loops)
            if steps is None and done == UNTIMED_STEPS + 5:
                total, minutes = affordable_steps(loops, options.minutes)
                progress.print(f"{total} steps each, {minutes:.1f} minutes at the pace so far")
            progress.update(bar, advance=1, losses=losses, total=total)
            if done % -(-total // 5) == 0 or done == total:
                for loop in loops:
                    loop.validate(validation)
                progress.print(f"step {done:4}".ljust(15) + validation_row(loops))
            if done == total:
                break
    for loop in loops:
        loop.count_casts(tokens, targets)


def validation_row(loops: list[Loop]) -> str:
    """The last validation loss of every loop, under its name."""
    return "".join(f"{loop.validation[-1][1]:15.4f}" for loop in loops)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def result_table(loops: list[Loop]) -> Table:
    """What came out, one column for each loop."""
    autocast = loops[1]
    rows: dict[str, list[str]] = {
        "train loss (last 20 steps)": [],
        "validation loss": [],
        "ms per step, median": [],
        "    quartiles": [],
        "    relative to autocast": [],
        "first step (capture), s": [],
        "casts in a forward pass": [],
    }
    for loop in loops:
        low, middle, high = quartiles(loop.timed)
        rounds = zip(loop.timed, autocast.timed, strict=True)
        ratio = statistics.median(own / other for own, other in rounds)
        cells = (
            f"{statistics.fmean(loop.losses[-20:]):.4f}",
            f"{loop.validation[-1][1]:.4f}",
            f"{middle:.1f}",
            f"{low:.1f} – {high:.1f}",
            f"× {ratio:.3f}",
            f"{loop.seconds[0]:.2f}",
            str(loop.casts),
        )
        for row, cell in zip(rows.values(), cells, strict=True):
            row.append(cell)
    table = Table(
        title="Same weights, same batches, three precisions",
        title_justify="left",
        caption=RATIO,
        caption_justify="left",
    )
    table.add_column("")
    for loop in loops:
        table.add_column(loop.name, justify="right")
    for heading, row in rows.items():
        table.add_row(heading, *row)
    return table


def precision_report(model: GPT, width: int) -> str:
    """What mpgraph decided inside the first block, and why; of the graph that trains."""
    return mpgraph.explain(model).text(module="blocks.0", graph=1, width=width)


def write_json(path: Path, loops: list[Loop], settings: dict[str, object]) -> None:
    """Write every measured number; the file is either complete or not there."""
    loop_records = [
        {
            "name": loop.name,
            "losses": loop.losses,
            "validation": loop.validation,
            "seconds": loop.seconds,
            "casts": loop.casts,
        }
        for loop in loops
    ]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"settings": settings, "loops": loop_records}, indent=1) + "\n")
    os.replace(partial, path)


def machine(device: torch.device) -> dict[str, object]:
    """What the numbers depend on besides the code."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware, as oneDNN sees it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, help=f"steps of each loop (as time allows, {MOST_STEPS} at most)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=4.0,
        help=f"without --steps: how long (%(default)s), if {FEWEST_STEPS} steps fit into it",
    )
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        help="where to train (%(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (as torch chooses)")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error("--steps must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None, config: GPTConfig | None = None) -> None:
    """Train, then print and write what came out."""
    options = parse_arguments(arguments)
    emulated = options.device.type == "cpu" and not has_bf16_instructions()
    batch = SMALL_BATCH if emulated else BATCH
    config = config or GPTConfig(context=64 if emulated else 128)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    settings = machine(options.device) | asdict(config)
    settings |= {"batch": batch, "seed": options.seed}

    loops = make_loops(config, options.device, options.seed)
    parameters = sum(p.numel() for p in loops[0].model.parameters())
    console.print(
        f"GPT of {parameters / 1e6:.1f} million parameters, {batch} × {config.context} bytes a "
        f"step, on {options.device} ({settings['device']}, {settings['threads']} CPU threads)."
    )
    if emulated:
        console.print(
            "This CPU has no bf16 instructions: bf16 is emulated, and far slower than fp32. "
            "The batches are smaller for that."
        )
    train(loops, config, batch, options)
    settings["steps"] = len(loops[0].losses)

    console.print("\nThe precision report of the first block:")
    console.print(
        precision_report(loops[2].model, console.width),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(result_table(loops))
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "losses.json", loops, settings)
    curves = {loop.name: (loop.losses, loop.validation) for loop in loops}
    draw_losses(options.out / "losses.png", curves, baseline="fp32")
    console.print(f"Wrote {options.out / 'losses.png'} and {options.out / 'losses.json'}.")


if __name__ == "__main__":
    main()
