"""Measure what the installed onnxruntime runs in 16 bit, and hold mpgraph's table to it.

    python tools/probe_ort.py            # every operator, dtype, opset and optimization level
    python tools/probe_ort.py --quick    # the first and the last opset and level
    python tools/probe_ort.py --target cuda

For every operator of a row in ``mpgraph/onnx/target_rows.py`` it builds a model of one operator
between two explicit casts, fp32 → 16 bit → operator → fp32, and compares it with the operator in
fp32 on numbers that were rounded before. A runtime that says yes and drops the rounding is wrong
just as one that refuses. Exits with 1 where the table claims what is not so.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpgraph.ir import short_name
from mpgraph.onnx.targets import OPSETS, TARGETS, Target, target_of

ELEMENT = {
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float32: TensorProto.FLOAT,
}
LEVELS = tuple(
    getattr(onnxruntime.GraphOptimizationLevel, name)
    for name in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
)
RUNS, LOSES_ROUNDING, REFUSED = "runs", "loses the rounding", "refused"
OTHER = 1.7  # no 16-bit number
X, W = "low", "other"  # among a case's inputs: the tensor, and another one, both in 16 bit


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of one operator on a tensor of 2 × 4 × 4 numbers.

    Attributes:
        inputs: X, W or a constant.
        rank: Of the result.
        results: How many there are.
        exact: Whether it only moves or selects numbers.
        attributes: Of the node.
    """

    inputs: tuple[Any, ...] = (X,)
    rank: int = 3
    results: int = 1
    exact: bool = True
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)


def _ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int64)


def _computes(*inputs: Any, rank: int = 3, **attributes: Any) -> Case:
    return Case(inputs or (X,), rank, exact=False, attributes=attributes)


_SOME = np.arange(32).reshape(2, 4, 4) % 3 == 0
CASES: dict[str, Case] = {
    "Concat": Case((X, X), attributes={"axis": 0}),
    "Expand": Case((X, _ints(3, 2, 4, 4)), 4),
    "Flatten": Case(rank=2),
    "Gather": Case((X, _ints(1, 0)), attributes={"axis": 1}),
    "GatherElements": Case((X, np.ones((2, 4, 1), np.int64)), attributes={"axis": 2}),
    "GatherND": Case((X, np.array([[0, 1], [1, 3]], np.int64)), 2),
    "Identity": Case(),
    "Pad": Case((X, _ints(0, 0, 1, 0, 0, 2))),
    "Reshape": Case((X, _ints(4, 8)), 2),
    "Slice": Case((X, _ints(0), _ints(3), _ints(1), _ints(2))),
    "Split": Case((X, _ints(1, 3)), results=2, attributes={"axis": 1}),
    "Squeeze": Case((X, _ints(1))),
    "Tile": Case((X, _ints(1, 2, 1))),
    "Transpose": Case(attributes={"perm": [2, 0, 1]}),
    "Trilu": Case(),
    "Unsqueeze": Case((X, _ints(0)), 4),
    "Where": Case((_SOME, X, X)),
    "Abs": _computes(),
    "Add": _computes(X, W),
    "Conv": _computes(X, X, strides=[1]),
    "Div": _computes(X, W),
    "Erf": _computes(),
    "Exp": _computes(),
    "Gemm": _computes(X, X, rank=2),
    "MatMul": _computes(X, X),
    "Mul": _computes(X, W),
    "Neg": _computes(),
    "Relu": _computes(),
    "Sigmoid": _computes(),
    "Sqrt": _computes(),
    "Sub": _computes(X, W),
    "Tanh": _computes(),
}  # fmt: skip


def make_model(
    operator: str, dtype: torch.dtype, opset: int, shape: tuple[int, ...], other: float = OTHER
) -> Any:
    """The operator on ``x`` cast to ``dtype``, its results cast to fp32."""
    case = CASES[operator]
    sources = [("x", X), *([("w", W)] if W in map(str, case.inputs) else [])]
    nodes = [helper.make_node("Cast", [a], [b], to=ELEMENT[dtype]) for a, b in sources]
    constants = [numpy_helper.from_array(np.full((4,), other, np.float32), "w")][: len(sources) - 1]
    inputs = []
    for index, value in enumerate(case.inputs):
        if isinstance(value, str):
            inputs.append(value)
        else:
            constants.append(numpy_helper.from_array(value, f"c{index}"))
            inputs.append(f"c{index}")
    results = [f"r{index}" for index in range(case.results)]
    nodes.append(helper.make_node(operator, inputs, results, **case.attributes))
    outputs = [f"y{index}" for index in range(case.results)]
    nodes += [
        helper.make_node("Cast", [r], [y], to=TensorProto.FLOAT)
        for r, y in zip(results, outputs, strict=True)
    ]
    sizes = [f"n{axis}" for axis in range(case.rank)]
    graph = helper.make_graph(
        nodes,
        operator,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, sizes) for y in outputs],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def run_model(model: Any, level: Any, x: np.ndarray[Any, Any], provider: str) -> list[torch.Tensor]:
    """What onnxruntime makes of ``x``."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    if provider != "CPUExecutionProvider":  # its kernels would stand in for missing ones
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
    if provider not in session.get_providers():
        raise RuntimeError(f"{provider} does not start")
    return [torch.from_numpy(y) for y in session.run(None, {"x": x})]


def example(operator: str) -> torch.Tensor:
    """Numbers that are no 16-bit numbers."""
    x = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)) * 4 - 1
    if operator == "Squeeze":
        return x[:, None]
    return x[0] if operator == "Gemm" else x.abs() if operator == "Sqrt" else x


def measure(
    operator: str, dtype: torch.dtype, opset: int, provider: str, levels: tuple[Any, ...] = LEVELS
) -> str:
    """Whether an operator runs in a 16-bit dtype and rounds as it does, at every level."""
    x = example(operator)
    model = make_model(operator, dtype, opset, tuple(x.shape))
    try:
        onnx.checker.check_model(model, full_check=True)
        found = [run_model(model, level, x.numpy(), provider) for level in levels]
    except Exception:
        return REFUSED
    other = torch.tensor(OTHER).to(dtype).item()
    plain = make_model(operator, torch.float32, opset, tuple(x.shape), other)
    wanted = run_model(plain, LEVELS[0], x.to(dtype).float().numpy(), "CPUExecutionProvider")
    same = all(
        _is_rounded(one, other, dtype, CASES[operator].exact)
        for result in found
        for one, other in zip(result, wanted, strict=True)
    )
    return RUNS if same else LOSES_ROUNDING


def _is_rounded(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, exact: bool) -> bool:
    """A 16-bit result of what was rounded before; computed ones may be one unit apart."""
    low = found.to(dtype)
    if not torch.equal(low.float(), found):
        return False
    error = (found - wanted.to(dtype).float()).abs()
    return bool((error <= (0 if exact else torch.finfo(dtype).eps * wanted.abs())).all())


def casts_survive(dtype: torch.dtype, provider: str, level: Any) -> bool:
    """Whether ``x`` → 16 bit → × 3e4 → 16 bit → × 3e-4, in fp32 between casts, is torch's bits."""
    names = ["x", "a", "b", "c", "d", "e", "f", "g", "y"]
    to = [ELEMENT[dtype], TensorProto.FLOAT]
    nodes = []
    for step, (source, result) in enumerate(itertools.pairwise(names)):
        if step in (2, 5):
            factor = "up" if step == 2 else "down"
            nodes.append(helper.make_node("Mul", [source, factor], [result]))
        else:
            nodes.append(helper.make_node("Cast", [source], [result], to=to[step % 3 % 2]))
    x = _many_numbers()
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [len(x)]) for n in ("x", "y")]
    factors = [("up", 3e4), ("down", 3e-4)]
    constants = [numpy_helper.from_array(np.float32(v), name) for name, v in factors]
    graph = helper.make_graph(nodes, "casts", shapes[:1], shapes[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (found,) = run_model(model, level, x.numpy(), provider)
    wanted = (x.to(dtype).float() * 3e4).to(dtype).float()
    wanted = (wanted * np.float32(3e-4)).to(dtype).float()
    return torch.equal(found.nan_to_num(nan=1.5), wanted.nan_to_num(nan=1.5))


def _many_numbers() -> torch.Tensor:
    """Every fp16 and bf16 number, and numbers between them."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    whole = torch.cat([bits.view(torch.float16).float(), bits.view(torch.bfloat16).float()])
    between = torch.randn(2**16, generator=torch.Generator().manual_seed(0)) * 10
    return torch.cat([whole, between])


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was measured of one operator, next to what the table says."""

    operator: str
    dtype: torch.dtype
    opset: int
    found: str
    claimed: bool

    @property
    def is_wrong(self) -> bool:
        """The table claims that it runs, and it does not."""
        return self.claimed and self.found != RUNS


def probe(
    target: Target, opsets: tuple[int, ...], levels: tuple[Any, ...] = LEVELS
) -> Iterator[Finding]:
    """Measure every operator of the table for one target."""
    for operator in CASES:
        for dtype in (torch.float16, torch.bfloat16):
            for opset in opsets:
                found = measure(operator, dtype, opset, target.provider, levels)
                claimed = target_of(target.name, opset).runs(operator, dtype)
                yield Finding(operator, dtype, opset, found, claimed)


def _table(findings: list[Finding]) -> Table:
    table = Table("operator", "dtype", "opsets", "measured", "in the table", box=None)
    groups: dict[tuple[str, str, str, bool], list[int]] = {}
    for f in findings:
        groups.setdefault((f.operator, short_name(f.dtype), f.found, f.claimed), []).append(f.opset)
    for (operator, dtype, found, claimed), opsets in groups.items():
        span = f"{opsets[0]}–{opsets[-1]}"
        verdict = "WRONG" if claimed and found != RUNS else "runs" if claimed else "–"
        table.add_row(operator, dtype, span, found, verdict)
    return table


def _is_available(provider: str) -> bool:
    try:
        model = make_model("Identity", torch.float32, 18, (2, 4, 4))
        run_model(model, LEVELS[0], np.zeros((2, 4, 4), np.float32), provider)
        return provider in onnxruntime.get_available_providers()
    except Exception:
        return False


def main(arguments: list[str] | None = None) -> int:
    """Probe, print, and say whether the table is right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--target", choices=sorted(TARGETS), default="cpu")
    parser.add_argument("--quick", action="store_true", help="first and last opset and level only")
    options = parser.parse_args(arguments)
    target = TARGETS[options.target]
    console: Callable[..., Any] = Console(width=100).print
    if not _is_available(target.provider):
        console(f"{target.provider} does not run here: nothing was measured")
        return 2
    opsets = tuple(range(OPSETS[0], OPSETS[1] + 1))
    ends: Any = (LEVELS[0], LEVELS[-1]) if options.quick else LEVELS
    findings = list(probe(target, OPSETS if options.quick else opsets, ends))
    survive = {
        short_name(dtype): all(casts_survive(dtype, target.provider, level) for level in ends)
        for dtype in (torch.float16, torch.bfloat16)
    }
    console(f"onnxruntime {onnxruntime.__version__}, {target.provider}")
    console(_table(findings))
    console(f"pairs of explicit casts survive every level: {survive}")
    wrong = [f for f in findings if f.is_wrong]
    console(f"{len(wrong)} of {len(findings)} rows are wrong")
    return int(bool(wrong) or not all(survive.values()))


if __name__ == "__main__":
    sys.exit(main())
