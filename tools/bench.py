"""Time a training step, every way to run it, in one run: mpgraph ÷ what people use today.

    python tools/bench.py [--models gpt mlp] [--precision fp16] [--device cuda]
                          [--json FILE] [--markdown FILE] [--plot FILE]

All ways start from the same weights, see the same batch, and take their steps in turn, the order
changing from step to step; compiling and warm-up stay apart. Ratios are medians of the ratio of
neighbouring steps to the best that users have without mpgraph: ``torch.compile`` of the model
under ``torch.autocast``, with a fused AdamW (and ``GradScaler`` in fp16).

Casts are counted in the graphs that Inductor is given, forward, backward and update; most of them
end inside a fused kernel. The cache of AOTAutograd is off: in torch 2.11 its key leaves out the
dtype of an autocast region around the compiled call, so that a peer in fp16 would run what was
compiled for bf16.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from bench_counts import Casts, launches, peak_bytes
from bench_eager import DTYPES, machine, write
from bench_models import CASES, RETURN_LOSS, case
from bench_report import markdown, plot
from bench_trainer import TrainerSteps
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import mpgraph

PEER = "compile + autocast"
Step = Callable[[], Any]


class Ways:
    """Every way to run one step of one model, each with weights and optimizer of its own."""

    def __init__(self, name: str, device: str, precision: str) -> None:
        self.model, self.loss, self.batch = case(name, device)
        self.device, self.precision = device, precision
        self.returns_loss = name in RETURN_LOSS

    def made(self, names: list[str]) -> dict[str, Step]:
        """The steps, by name."""
        names = [name for name in names if name not in TRAINERS or self.returns_loss]
        return {name: getattr(self, _METHODS[name])() for name in names}

    def fp32(self) -> Step:
        """Eager mode in float32."""
        return self._step(copy.deepcopy(self.model), None)

    def autocast(self) -> Step:
        """Eager mode under ``torch.autocast``."""
        return self._step(copy.deepcopy(self.model), DTYPES[self.precision])

    def compiled_autocast(self) -> Step:
        """The peer."""
        model = copy.deepcopy(self.model)
        return self._step(model, DTYPES[self.precision], torch.compile(model))

    def convert(self) -> Step:
        """Converted by mpgraph, in eager mode."""
        return self._guarded(None)

    def compiled_convert(self) -> Step:
        """Converted by mpgraph, then compiled."""
        return self._guarded(torch.compile)

    def pure(self) -> Step:
        """Everything in 16 bit, compiled: the lower limit, which does not train as well."""
        model = copy.deepcopy(self.model).to(DTYPES[self.precision])
        batch = [v.to(DTYPES[self.precision]) if v.is_floating_point() else v for v in self.batch]
        return self._step(model, None, torch.compile(model), batch=batch)

    def train_step(
        self, compile: bool | str = True, policy: str = "", rows: int | None = None
    ) -> Step:
        """The whole step as one graph."""
        model = copy.deepcopy(self.model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        policy = policy or f"autocast-{self.device}"
        step = mpgraph.TrainStep(
            model, optimizer, self.loss, precision=self.precision, policy=policy, compile=compile,
            chunk_loss_head=rows,
        )  # fmt: skip
        return lambda: step(*self.batch)

    def replayed_step(self) -> Step:
        """The same, replayed as a CUDA graph."""
        return self.train_step("reduce-overhead")

    def lean_step(self) -> Step:
        """The whole step as one graph, norms and residual stream in 16 bit."""
        return self.train_step("reduce-overhead" if self.device == "cuda" else True, "lean")

    def chunked_step(self) -> Step:
        """The whole step as one graph, the last layer and its loss in chunks."""
        return self.train_step(rows=2048 if self.device == "cuda" else 256)

    def trainer(self) -> Step:
        """The Hugging Face Trainer in 16 bit, eager."""
        return self._trainer()

    def compiled_trainer(self) -> Step:
        """The Hugging Face Trainer in 16 bit, compiled."""
        return self._trainer(torch_compile=True)

    def _trainer(self, **options: Any) -> Step:
        options.update({self.precision: True, "use_cpu": self.device == "cpu"})
        return TrainerSteps(copy.deepcopy(self.model), self.batch, **options)

    def _guarded(self, compiler: Callable[..., Any] | None) -> Step:
        policy = f"autocast-{self.device}"
        model = mpgraph.convert(copy.deepcopy(self.model), self.precision, policy=policy)
        call = model if compiler is None else compiler(model, fullgraph=True)
        return self._step(model, None, call, guarded=self.precision == "fp16")

    def _step(
        self,
        model: nn.Module,
        dtype: torch.dtype | None,
        call: Any = None,
        *,
        guarded: bool = False,
        batch: Any = None,
    ) -> Step:
        call, batch = model if call is None else call, batch or self.batch
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        scaler = torch.amp.GradScaler(self.device, enabled=dtype is torch.float16)
        if guarded:
            mpgraph.guard(optimizer, model)

        def step() -> Any:
            with torch.autocast(self.device, dtype, enabled=dtype is not None):
                loss = self.loss(call, *batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            return loss

        return step


_METHODS = {
    "fp32": "fp32",
    "autocast": "autocast",
    PEER: "compiled_autocast",
    "mpgraph": "convert",
    "compile + mpgraph": "compiled_convert",
    "TrainStep": "train_step",
    "TrainStep, replayed": "replayed_step",
    "TrainStep, lean": "lean_step",
    "TrainStep, chunked": "chunked_step",
    "compile, pure 16-bit": "pure",
    "HF Trainer": "trainer",
    "HF Trainer, compiled": "compiled_trainer",
}
TRAINERS = frozenset({"HF Trainer", "HF Trainer, compiled"})  # take models that return their loss


def measure(name: str, device: str, precision: str, steps: int, ways: list[str]) -> dict[str, Any]:
    """One model, every way, step by step in turn."""
    torch._dynamo.reset()
    subject = Ways(name, device, precision)
    made = subject.made(ways)
    figures: dict[str, dict[str, Any]] = {}
    for way, step in track(made.items(), f"{name}: compiling, warming up", total=len(made)):
        figures[way] = _warmed(step, device)
    seconds = in_turns(made, steps, name, device)
    return {
        "model": name,
        "precision": precision,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        **{key: {way: figures[way][key] for way in made} for key in next(iter(figures.values()))},
        "seconds": seconds,
        "ratios": {way: ratio(seconds[way], seconds[PEER]) for way in made},
    }


def in_turns(made: dict[str, Step], steps: int, name: str, device: str) -> dict[str, list[float]]:
    """The seconds of every step, the order of the ways changing from step to step."""
    seconds: dict[str, list[float]] = {way: [] for way in made}
    for index in track(range(steps), name):
        for way in sorted(made, reverse=bool(index % 2)):
            _wait(device)
            started = time.perf_counter()
            made[way]()
            _wait(device)
            seconds[way].append(time.perf_counter() - started)
    return seconds


def ratio(found: list[float], peer: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of neighbouring steps."""
    ratios = [f / p for f, p in zip(found, peer, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "low": low, "high": high}


def _warmed(step: Step, device: str) -> dict[str, Any]:
    """Take the steps that compile; what they and a step after them cost, apart from time."""
    casts = Casts()
    started = time.perf_counter()
    with casts.noted():
        loss = float(step())
        step()  # an optimizer's first step is a special one
        first = time.perf_counter() - started
        # A replay takes the memory of its recording, which is one of these.
        peaks = [peak_bytes(step, device) for _ in range(3)]
    return {
        "first_step_seconds": first,
        "first_loss": loss,
        "casts": casts.count,
        "cast_mebibytes": casts.bytes / 2**20,
        "peak_mebibytes": max(peaks) / 2**20,
        "launches": launches(step, device),
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The figures, for people."""
    table = Table("model", "way", "ms", "÷ peer", "quartiles", "peak MiB", "casts", "first step, s")
    for row in rows:
        for way, ratio in row["ratios"].items():
            table.add_row(
                f"{row['model']} {row['precision']}", way,
                f"{1e3 * statistics.median(row['seconds'][way]):.2f}", f"{ratio['median']:.3f}",
                f"{ratio['low']:.3f} - {ratio['high']:.3f}",
                f"{row['peak_mebibytes'][way]:.1f}", str(row["casts"][way]),
                f"{row['first_step_seconds'][way]:.1f}",
            )  # fmt: skip
        table.add_section()
    return table


def main() -> None:
    """Measure, print the table, keep the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=list(_METHODS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=list(DTYPES))
    for kind in ("json", "markdown", "plot"):
        parser.add_argument(f"--{kind}", type=Path)
    options = parser.parse_args()
    torch._functorch.config.enable_autograd_cache = False
    chosen = options.ways or [w for w in _METHODS if options.device == "cuda" or "replay" not in w]
    ways = list(dict.fromkeys([PEER, *chosen]))
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for precision in options.precision:
            rows.append(measure(name, options.device, precision, options.steps, ways))
            if options.json:
                write(options.json, {"machine": machine(options.device), "rows": rows})
    if options.markdown:
        options.markdown.write_text(markdown(rows, machine(options.device)))
    if options.plot:
        plot(rows, PEER, options.plot)
    Console(width=120).print(table_of(rows))


if __name__ == "__main__":
    main()
