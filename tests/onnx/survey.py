"""One operator with its backward pass, exported and run by onnxruntime, next to torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from mpgraph.onnx.functional import functional, in_plain_operators
from mpgraph.onnx.ports import widen_ports
from mpgraph.onnx.targets import TargetContext, target_of
from mpgraph.onnx.translate import translate
from mpgraph.passes.legalize import legalize
from mpgraph.pipeline import run_passes
from mpgraph.policy import Policy
from mpgraph.step.trace_gradients import _fake_leaf

from .survey_converted import as_converted
from .survey_row import Bools, Ints, Positive


def make(spec: Any, dtype: torch.dtype) -> Tensor:
    """An input."""
    if isinstance(spec, Ints):
        return torch.randint(0, spec.bound, spec.shape)
    if isinstance(spec, Bools):
        found = torch.rand(spec.shape) < 0.5
        found.view(-1)[0] = True
        return found
    if isinstance(spec, Positive):
        return (torch.rand(spec.shape) + 0.5).to(dtype)
    return torch.randn(spec).to(dtype)


@dataclasses.dataclass
class Run:
    """What one call gave: results, then the gradients of all floating inputs.

    Attributes:
        found: By onnxruntime.
        graph: By the graph that was exported, run by torch.
        eager: By torch; empty where torch has no kernel for this dtype.
    """

    found: list[Tensor]
    graph: list[Tensor]
    eager: list[Tensor]


def run(
    function: Callable[..., Any],
    specs: Sequence[Any],
    dtype: torch.dtype,
    *,
    size: int = 0,
    opset: int = 18,
    converted: bool = False,
) -> Run:
    """Run one call in all three ways.

    Args:
        function: The call.
        specs: What it takes.
        dtype: Of the floating inputs.
        size: Of a batch: the graph is exported with a symbolic first dimension of everything that
            has as many rows as the first input, and run with this many; 0: all sizes are fixed.
        opset: Of the exported model.
        converted: Whether to run the call as a model's graph has it after every pass.
    """
    if converted:
        torch.manual_seed(0)
        function = as_converted(function, [make(spec, dtype) for spec in specs], dtype)
    inputs = _inputs(function, specs, dtype)
    joint = _joint(function, len(specs))
    gm = _traced(function, inputs[: len(specs)], len(inputs[0]) if size else 0)
    if size:
        inputs = _inputs(function, [resized(spec, len(inputs[0]), size) for spec in specs], dtype)
    eager = joint(*inputs) if dtype is torch.float32 else []
    found = _by_onnxruntime(gm, inputs, opset)
    with torch.no_grad():
        graph = gm(*[_wide(value) for value in inputs])
    return Run(found, [_wide(v) for v in graph], [_wide(v.detach()) for v in eager])


def _inputs(function: Callable[..., Any], specs: Sequence[Any], dtype: torch.dtype) -> list[Tensor]:
    """What the call takes, then the gradients of what it returns."""
    torch.manual_seed(0)
    inputs = [make(spec, dtype) for spec in specs]
    return inputs + [torch.randn(r.shape).to(r.dtype) for r in _results(function, inputs)]


def resized(spec: Any, rows: int, size: int) -> Any:
    """An input with ``size`` rows instead of ``rows``."""
    shape = getattr(spec, "shape", spec)
    if not shape or shape[0] != rows:
        return spec
    changed = (size, *shape[1:])
    return changed if shape is spec else dataclasses.replace(spec, shape=changed)


def _results(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Fake values like what the call returns."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return _gradients_of([mode.from_tensor(value) for value in inputs], function, mode)


def _gradients_of(
    fakes: Sequence[Tensor], function: Callable[..., Any], mode: FakeTensorMode
) -> list[Tensor]:
    """Fake values for the gradients of what the call returns."""
    with mode, in_plain_operators(), torch.no_grad(), enable_python_dispatcher():
        results = leaves(function(*fakes))
        return [torch.empty(r.shape, dtype=r.dtype) for r in results if r.is_floating_point()]


def _joint(function: Callable[..., Any], count: int) -> Callable[..., list[Tensor]]:
    def run(*given: Tensor) -> list[Tensor]:
        inputs, weights = list(given[:count]), given[count:]
        for i, value in enumerate(inputs):
            if value.is_floating_point():
                inputs[i] = value.detach().requires_grad_()
        with torch.enable_grad(), in_plain_operators():
            results = [r for r in leaves(function(*inputs)) if r.is_floating_point()]
            by = [value for value in inputs if value.is_floating_point()]
            pairs = [p for p in zip(results, weights, strict=True) if p[0].requires_grad]
            gradients: Any = []
            if pairs:
                gradients = torch.autograd.grad(
                    [r for r, _ in pairs], by, [w for _, w in pairs], allow_unused=True
                )
        return [*(r.detach() for r in results), *(g for g in gradients if g is not None)]

    return run


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a result."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _traced(
    function: Callable[..., Any], inputs: Sequence[Tensor], batch: int = 0
) -> fx.GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    fakes = [_fake_leaf(mode, x, _batch_dims(x, batch)) for x in inputs]
    fakes += _gradients_of(fakes, function, mode)
    with mode, enable_python_dispatcher():
        gm = make_fx(_joint(function, len(inputs)), _allow_non_fake_inputs=True)(*fakes)
    for node in gm.graph.nodes:
        node.meta["part"] = "forward"
    gm.graph.output_node().args = (tuple(gm.graph.output_node().args[0]),)  # type: ignore[arg-type]
    made = functional(gm).graph_module
    widen_ports(made)
    if batch:
        size = next(iter(made.graph.nodes)).meta["val"].shape[0]
        is_symbolic = isinstance(size, torch.SymInt) and not size.node.expr.is_number
        assert is_symbolic, "tracing has fixed the size of the batch"
    context = TargetContext(Policy(), None, target=target_of("cpu"))
    run_passes(made, (legalize,), context)
    return made


def _batch_dims(value: Tensor, batch: int) -> frozenset[int]:
    return frozenset({0} if batch and value.dim() and len(value) == batch else ())


def _by_onnxruntime(gm: fx.GraphModule, inputs: Sequence[Tensor], opset: int) -> list[Tensor]:
    names = [f"x{i}" for i in range(len(inputs))]
    count = len(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    model = translate(gm, names, [f"y{i}" for i in range(count)], opset=opset)
    proto = onnx_ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert {opset.domain for opset in proto.opset_import} == {""}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kept = {value.name for value in session.get_inputs()}
    feeds = {n: _wide(v).numpy() for n, v in zip(names, inputs, strict=True) if n in kept}
    return [torch.from_numpy(np.asarray(v)) for v in session.run(None, feeds)]


def _wide(value: Tensor) -> Tensor:
    is_half = value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest element; different NaNs are infinite."""
    assert found.shape == expected.shape
    a, b = found.double(), expected.double()
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) or not finite.any():
        return float("inf") if b.numel() and not torch.equal(a.isnan(), b.isnan()) else 0.0
    scale = float(b[finite].abs().max()) or 1.0
    return float((a[finite] - b[finite]).abs().max()) / scale
