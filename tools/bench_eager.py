"""Time an eager training step: converted by mpgraph ÷ under torch.autocast, in one run.

    python tools/bench_eager.py [--steps 30] [--accumulate 1 4] [--device cuda] [--json FILE]
    python tools/bench_eager.py --precision fp16   # with mpgraph.guard ÷ with GradScaler

Both models start from the same weights, see the same batches and take their steps in turn, the
order changing from step to step. Warm-up (capture included) stays apart. Figures are medians of
the ratio of neighbouring steps: on a noisy machine trust the ratio, not the milliseconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mpgraph
from mpgraph import ops
from mpgraph.module import MixedPrecision, state_of

ROOT = Path(__file__).resolve().parents[1]
Inputs = dict[str, Tensor]


def gpt() -> tuple[nn.Module, Inputs, Callable[[Any], Tensor]]:
    """The GPT of the demo, 3.3 million parameters."""
    sys.path.insert(0, str(ROOT / "examples"))
    from gpt import GPT, GPTConfig

    ids = torch.randint(0, 256, (8, 129))
    return GPT(GPTConfig()), {"tokens": ids[:, :-1], "targets": ids[:, 1:]}, lambda out: out


class Residual(nn.Module):
    """Two convolutions with batch norm around a shortcut, as in ResNet-18."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the picture if the stride is 2."""
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet() -> tuple[nn.Module, Inputs, Callable[[Any], Tensor]]:
    """A ResNet of eight convolutions on pictures of 64 × 64."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1), Residual(32, 64, 2), Residual(64, 128, 2),
        Residual(128, 128, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    target = torch.randint(0, 10, (16,))
    inputs = {"input": torch.randn(16, 3, 64, 64)}
    return model, inputs, lambda out: nn.functional.cross_entropy(out.float(), target)


def bert() -> tuple[nn.Module, Inputs, Callable[[Any], Tensor]]:
    """BERT-tiny of transformers: two layers, width 128, its own loss."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    )
    ids = torch.randint(0, config.vocab_size, (8, 64))
    inputs = {"input_ids": ids, "labels": ids}
    return BertForMaskedLM(config), inputs, lambda out: out.loss


def tiny() -> tuple[nn.Module, Inputs, Callable[[Any], Tensor]]:
    """The GPT at a size where a step is nothing but overhead."""
    sys.path.insert(0, str(ROOT / "examples"))
    from gpt import GPT, GPTConfig

    ids = torch.randint(0, 256, (2, 9))
    model = GPT(GPTConfig(width=16, context=8))
    return model, {"tokens": ids[:, :-1], "targets": ids[:, 1:]}, lambda out: out


MODELS = {"gpt": gpt, "resnet": resnet, "bert-tiny": bert, "tiny": tiny}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


_CASTS = (torch.ops.aten._to_copy.default, ops.LOWER, ops.WIDEN, ops.SCALE, ops.UNSCALE)


class CountCasts(TorchDispatchMode):
    """Counts conversions from one floating dtype to another."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; note it if it casts."""
        out = func(*args, **(kwargs or {}))
        if func in _CASTS and args[0].is_floating_point():
            self.count += args[0].dtype is not out.dtype and out.is_floating_point()
        return out


def measure(
    name: str, steps: int, accumulate: int, policy: str, precision: str, device: str
) -> dict[str, Any]:
    """One model, both ways, step by step in turn."""
    torch.manual_seed(0)
    with torch.device(device):
        model, inputs, loss = MODELS[name]()
    reference, converted = copy.deepcopy(model), mpgraph.convert(model, precision, policy=policy)

    def under_autocast() -> Tensor:
        with torch.autocast(device, DTYPES[precision]):
            return loss(reference(**inputs))

    ways = {
        "autocast": _step(reference, under_autocast, accumulate, precision == "fp16"),
        "mpgraph": _step(converted, lambda: loss(converted(**inputs)), accumulate, False),
    }
    casts = {}
    for way, step in ways.items():
        step()
        with CountCasts() as counter:
            step()
        casts[way] = counter.count
        step()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for index in track(range(steps), name):
        for way in sorted(ways, reverse=bool(index % 2)):
            started = time.perf_counter()
            ways[way]()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[way].append(time.perf_counter() - started)
    ratios = [m / a for m, a in zip(seconds["mpgraph"], seconds["autocast"], strict=True)]
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "model": name,
        "policy": policy,
        "accumulate": accumulate,
        "seconds": seconds,
        "casts_per_step": casts,
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": [quarters[0], quarters[2]],
    }


def _step(
    model: nn.Module, loss: Callable[[], Tensor], accumulate: int, with_scaler: bool
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler(_device(model), enabled=with_scaler)
    if isinstance(model, MixedPrecision) and state_of(model).settings.scaled:
        mpgraph.guard(optimizer, model)

    def step() -> None:
        for _ in range(accumulate):
            scaler.scale(loss() / accumulate).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Measure every model, print the table, keep the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--policies", nargs="+", help="autocast-<device> and default, unless given")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="bf16", choices=list(DTYPES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [
        measure(name, options.steps, accumulate, policy, options.precision, options.device)
        for name in options.models
        for policy in options.policies or (f"autocast-{options.device}", "default")
        for accumulate in options.accumulate
    ]
    table = Table("model", "policy", "micro-batches", "mpgraph ÷ autocast", "quartiles", "casts")
    for row in rows:
        low, high = row["ratio_quartiles"]
        casts = row["casts_per_step"]
        table.add_row(
            row["model"], row["policy"], str(row["accumulate"]), f"{row['ratio_median']:.3f}",
            f"{low:.3f} - {high:.3f}", f"{casts['mpgraph']} / {casts['autocast']}",
        )  # fmt: skip
    Console(width=100).print(table)
    if options.json:
        write(options.json, {"machine": machine(options.device), "rows": rows})


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The processor's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(path: Path, figures: dict[str, Any]) -> None:
    """Keep the raw figures: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(figures, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
