"""Small graphs in mpgraph's form, and the check that every test of a pass makes.

``graph_of(f, x, w)`` traces a Python function: placeholders have the names of its arguments,
``cast(x, dtype)`` inside it is a cast as mpgraph inserts them, ``x.to(dtype)`` one of the model.
"""

from __future__ import annotations

import contextlib
import inspect
import textwrap
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from mpgraph import ir
from mpgraph.capture.captured import Slot
from mpgraph.capture.export import Call, capture_export
from mpgraph.graph_text import text
from mpgraph.op_table import Rule
from mpgraph.pipeline import PassContext, run_passes
from mpgraph.policy import Policy
from mpgraph.structure import flatten

aten = torch.ops.aten
bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
inf, nan = float("inf"), float("nan")

SPECIAL = (0.0, -0.0, inf, -inf, nan, 1 / 3, -1.5, 65504.0, 65520.0, 1e-8, 3e38, -3e38, 1e-40)


def cast(x, dtype):
    """A cast that mpgraph inserted."""
    with fx_traceback.annotate({"inserted": True}):
        return aten.to.dtype(x, dtype)


def special(*shape, dtype=f32):
    """Random values with infinities, NaN, signed zeros and extremes strewn in."""
    x = torch.randn(shape, dtype=f32)
    values = torch.tensor(SPECIAL)
    chosen = torch.rand(shape) < 0.4
    x[chosen] = values[torch.randint(len(values), (int(chosen.sum()),))]
    return x.to(dtype)


def parameter(*shape, dtype=f32):
    return nn.Parameter(special(*shape, dtype=dtype))


def context_of(**changes) -> PassContext:
    policy = Policy(changes.pop("preset", "default"), **changes.pop("policy", {}))
    return PassContext(**{"policy": policy, "compute": bf16, **changes})


def graph_of(function, *inputs, context=None, grad=True):
    """``function`` as a graph module, traced under the autocast of ``context`` if there is one."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    fakes = [mode.from_tensor(x) for x in inputs]
    autocast = context.autocast() if context else contextlib.nullcontext()
    with mode, autocast, torch.set_grad_enabled(grad), fx_traceback.preserve_node_meta():
        gm = make_fx(lambda *args: function(*args), pre_dispatch=True)(*fakes)
    _describe_inputs(gm, function, inputs)
    for body in ir.all_graphs(gm):
        _describe_nodes(body.graph, grad)
    return gm


def captured(module, *inputs, context=None, grad=True):
    """What the export engine makes of one call of a module."""
    context = context or context_of()
    leaves, spec = flatten((inputs, {}))
    names = [f"x{i}" for i in range(len(leaves))]
    call = Call(leaves, spec, names, [frozenset({0} if leaf.dim() else ()) for leaf in leaves])
    with torch.set_grad_enabled(grad):
        return capture_export(module, type(module).forward, call, context.autocast()).graph_module


def values_for(gm, module, *inputs):
    """One value per placeholder of a captured graph."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    slots = [node.meta["slot"] for node in gm.graph.find_nodes(op="placeholder")]
    return [inputs[s.index] if s.kind == "input" else state[s.target] for s in slots]


def _describe_inputs(gm, function, inputs):
    names = inspect.signature(function).parameters
    placeholders = gm.graph.find_nodes(op="placeholder")
    for index, (node, name, value) in enumerate(zip(placeholders, names, inputs, strict=False)):
        is_parameter = isinstance(value, nn.Parameter)
        node._rename(f"p_{name}" if is_parameter else name)
        node.meta["slot"] = Slot("parameter" if is_parameter else "input", name, index)
        node.meta["leaf"] = is_parameter
        node.meta["differentiable"] = value.is_floating_point()


def _describe_nodes(graph, grad):
    now = grad
    for node in graph.nodes:
        custom = node.meta.pop("custom", None) or {}
        node.meta["captured"] = node.meta.setdefault("val", None)
        node.meta["module_path"] = ""
        if node.target is ir.SET_GRAD:
            now = bool(node.args[0])
        elif now is not grad:
            node.meta["grad"] = now
        if custom.get("inserted"):
            node.meta["inserted"] = True
            source = node.args[0]
            node._rename(f"{source.name}_{ir.short_name(node.args[1])}")
            del node.meta["captured"]
        elif ir.is_operator(node):
            node.meta["decision"] = ir.Decision(Rule.FOLLOW, None, "as in the test", "test")


def results_and_grads(gm, inputs, make_cotangent=special):
    """What the graph yields, and the gradient of every floating input that requires one."""
    torch.manual_seed(1)
    copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    before = torch.is_grad_enabled()
    # torch.autocast treats leaves specially; a graph does not, but may write to its inputs.
    is_graph = isinstance(gm, torch.fx.GraphModule)
    inputs = [x.view_as(x) if is_graph and x.requires_grad else x for x in copies]
    outputs = pytree.tree_leaves(gm(*inputs))
    torch.set_grad_enabled(before)
    differentiable = [y for y in outputs if isinstance(y, torch.Tensor) and y.requires_grad]
    leaves = [x for x in copies if x.requires_grad]
    torch.manual_seed(2)
    cotangents = [make_cotangent(*y.shape, dtype=y.dtype) for y in differentiable]
    grads = ()
    if differentiable and leaves:
        grads = torch.autograd.grad(differentiable, leaves, cotangents, allow_unused=True)
    return outputs, grads


def assert_exact(got, want):
    """Same dtype, same values, same signed zeros. NaN payloads may differ.

    torch's own float32 -> bfloat16 changes payloads with and without a float64 step between.
    """
    if got is None or want is None or not isinstance(got, torch.Tensor):
        assert got is want or got == want
        return
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    number = ~want.isnan()
    assert torch.equal(got.signbit() & number, want.signbit() & number)


def check_pass(graph_pass, function, *inputs, edits, expect=None, exact=True, run=True, **options):
    """Run one pass over ``function``; check its edit count, its text, and every bit it yields.

    The verification around every pass (tests/conftest.py) checks that the count is not a lie.
    """
    grad = options.get("grad", True)
    context = context_of(**options)
    gm = graph_of(function, *inputs, grad=grad)
    return check_graph(
        graph_pass, gm, *inputs, edits=edits, expect=expect, exact=exact, run=run, context=context
    )


def check_graph(graph_pass, gm, *inputs, edits, expect=None, exact=True, run=True, context):
    with torch.set_grad_enabled(context.grad):
        want = results_and_grads(gm, inputs) if run else None
        (report,) = run_passes(gm, [graph_pass], context)
        got = results_and_grads(gm, inputs) if run else None
    if expect is not None:
        assert text(gm) == textwrap.dedent(expect).strip(), text(gm)
    assert report.name == graph_pass.name
    assert report.edits == edits if edits is not None else report.edits > 0
    if exact and run:
        assert graph_pass.numerics == "exact"
        assert_same(got, want)
    return gm


def assert_same(got, want):
    """Equal results and equal gradients, to the bit."""
    for one, other in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        assert_exact(one, other)


def targets(gm) -> list[str]:
    """The operators of a graph, in order."""
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def casts(gm) -> list[Any]:
    return [n for body in ir.all_graphs(gm) for n in body.graph.nodes if ir.is_cast(n)]
