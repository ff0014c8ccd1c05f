"""Inference files side by side: mpgraph's, and onnxconverter-common's float16 of the same export.

    python tools/bench_onnx_infer.py [--device cuda] --out docs/benchmarks/onnx-inference

needs ``pip install onnxconverter-common``. Every model is exported in fp32, fp16 and bf16 by
mpgraph; the converter makes an fp16 file of the fp32 one. All files run on the CPU provider with
one thread, or on the CUDA provider (without TF32), in turns. Per file: does it load, how far is it
from the fp32 model and from the fp16 (bf16) model in torch, how large is it, and how long does a
call take (median, and spread from the 10th to the 90th percentile; and ÷ the fp32 file's call of
the same round, median and quartiles). Writes ``<out>.json`` and ``<out>.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import ratio
from bench_eager import processor, write
from gpt import GPT, GPTConfig

import mpgraph
from mpgraph.onnx.self_check import difference

ROOT = Path(__file__).resolve().parents[1]


def mlp() -> nn.Module:
    """Three wide layers."""
    return nn.Sequential(
        nn.Linear(512, 2048), nn.GELU(), nn.LayerNorm(2048), nn.Linear(2048, 2048), nn.GELU(),
        nn.Linear(2048, 100),
    )  # fmt: skip


def cnn() -> nn.Module:
    """Convolutions with BatchNorm."""
    layers: list[nn.Module] = []
    for width, out in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def encoder() -> nn.Module:
    """Two transformer layers."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS: dict[str, Any] = {
    "mlp": (mlp, lambda: torch.randn(32, 512)),
    "cnn": (cnn, lambda: torch.randn(8, 3, 32, 32)),
    "gpt": (lambda: GPT(GPTConfig()), lambda: torch.randint(0, 256, (4, 64))),
    "encoder": (encoder, lambda: torch.randn(4, 64, 256)),
}


@dataclasses.dataclass
class Row:
    """One file."""

    model: str
    file: str
    loads: bool
    size: int = 0
    from_fp32: float | None = None
    from_16_bit: float | None = None
    nan: bool = False
    milliseconds: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: dict[str, float] | None = None
    why: str = ""


def convert_float16(source: Path, target: Path) -> None:
    """The converter's fp16 file, fp32 inputs and outputs."""
    from onnxconverter_common import float16

    made = float16.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True)
    onnx.save(made, str(target))


def measure(name: str, rounds: int, folder: Path, device: str) -> list[Row]:
    """All files of one model."""
    torch.manual_seed(0)
    make, call = MODELS[name]
    model, x = make().eval(), call()
    wanted = {}
    for precision in ("fp32", "fp16", "bf16"):
        path = folder / f"mpgraph {precision}.onnx"
        mpgraph.export_onnx(model, path, x, precision=precision, target=device)
        with torch.no_grad():
            wanted[precision] = mpgraph.convert(model, precision)(x).float()
    rows, sessions = [], {}
    for label, kind in (
        ("mpgraph fp32", "fp32"), ("converter fp16", "fp16"), ("mpgraph fp16", "fp16"),
        ("mpgraph bf16", "bf16"),
    ):  # fmt: skip
        path = folder / f"{label}.onnx"
        row = Row(name, label, loads=False)
        rows.append(row)
        try:
            if label == "converter fp16":
                convert_float16(folder / "mpgraph fp32.onnx", path)
            row.size = path.stat().st_size
            sessions[label] = session(path, device)
            found = run(sessions[label], x)
            row.loads = True
        except Exception as error:
            # Without the path of the temporary file.
            row.why = str(error).splitlines()[0].partition(".onnx failed:")[2] or str(error)
            row.why = row.why[:200].replace("|", "\\|")
            continue
        row.nan = bool(found.isnan().any() | found.isinf().any())
        row.from_fp32 = finite(difference(found, wanted["fp32"]))
        row.from_16_bit = finite(difference(found, wanted[kind]))
    times = in_turns(sessions, x, rounds)
    for row in rows:
        if row.file in times:
            values = sorted(times[row.file])
            row.milliseconds = round(statistics.median(values), 3)
            row.low = round(values[len(values) // 10], 3)
            row.high = round(values[-1 - len(values) // 10], 3)
            row.ratio = ratio(times[row.file], times["mpgraph fp32"])
    return rows


def finite(value: float) -> float | None:
    """None in place of an infinite difference: JSON has none."""
    return value if value < float("inf") else None


PROVIDERS: dict[str, Any] = {
    "cpu": "CPUExecutionProvider",
    "cuda": ("CUDAExecutionProvider", {"use_tf32": 0}),
}


def session(path: Path, device: str) -> Any:
    """A session of the device's provider, with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=[PROVIDERS[device]])


def run(session: Any, x: torch.Tensor) -> torch.Tensor:
    """The first output."""
    (declared,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {declared.name: x.numpy()})[0])


def in_turns(sessions: dict[str, Any], x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call, one file after the other, round after round."""
    times: dict[str, list[float]] = {label: [] for label in sessions}
    for turn in range(rounds + 3):
        for label, made in sessions.items():
            start = time.perf_counter()
            run(made, x)
            if turn >= 3:
                times[label].append(1e3 * (time.perf_counter() - start))
    return times


def table(record: dict[str, Any]) -> str:
    """The record as a page."""
    lines = [
        "# ONNX inference files",
        "",
        f"`{record['command']}`: {record['machine']}, onnxruntime {record['onnxruntime']}, torch "
        f"{record['torch']}, onnxconverter-common {record['converter']}, one thread, median of "
        f"{record['rounds']} calls in turns (10th to 90th percentile).",
        "",
        "| model | file | loads | from fp32 | from 16 bit in torch | size | ms | ÷ fp32 file |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['model']} | {row['file']} | {loads(row)} | {figure(row, 'from_fp32')} | "
            f"{figure(row, 'from_16_bit')} | {row['size'] / 1e6:.2f} MB | {duration(row)} | "
            f"{quotient(row)} |"
        )
    return "\n".join(lines) + "\n"


def loads(row: dict[str, Any]) -> str:
    """Yes, or why not."""
    return "yes" if row["loads"] else f"no: {row['why']}"


def figure(row: dict[str, Any], key: str) -> str:
    """A difference, relative to the largest element."""
    if not row["loads"]:
        return "–"
    return "inf or NaN" if row[key] is None else f"{row[key]:.1e}"


def duration(row: dict[str, Any]) -> str:
    """Median and spread."""
    if row["milliseconds"] is None:
        return "–"
    return f"{row['milliseconds']:.2f} ({row['low']:.2f}–{row['high']:.2f})"


def quotient(row: dict[str, Any]) -> str:
    """The time of a call ÷ that of the fp32 file, and quartiles."""
    found = row["ratio"]
    return f"{found['median']:.2f} [{found['low']:.2f} – {found['high']:.2f}]" if found else "–"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--device", choices=sorted(PROVIDERS), default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/onnx-inference")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import onnxconverter_common

    rows: list[Row] = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(name, options.rounds, Path(folder), options.device)
    record = {
        "command": f"python tools/bench_onnx_infer.py --rounds {options.rounds}",
        "machine": processor() if options.device == "cpu" else torch.cuda.get_device_name(),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "converter": onnxconverter_common.__version__,
        "rounds": options.rounds,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write(options.out.with_suffix(".json"), record)
    options.out.with_suffix(".md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
