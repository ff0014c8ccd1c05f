"""A graph as a ``torch.export.ExportedProgram``, and the functional graph that ONNX is made of."""

from __future__ import annotations

import contextlib
import io
import logging
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx
from torch._export.verifier import TrainingIRVerifier, Verifier
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from mpgraph import ir
from mpgraph.errors import ExportError
from mpgraph.onnx.composites import opened
from mpgraph.onnx.whole_operators import whole_operators
from mpgraph.recurrent import unrolled_in_shape

State = Mapping[str, tuple[str, torch.Tensor]]
NO_STATE: State = types.MappingProxyType({})


def as_program(
    gm: fx.GraphModule, state: State = NO_STATE, *, functional: bool = True
) -> ExportedProgram:
    """The graph as a program.

    Args:
        gm: A flat graph that returns a tuple of tensors, with ``meta["val"]`` on every node. The
            tensors that it holds become constants of the program.
        state: For each placeholder that is no input, by its name: the name and the value that it
            has in the program.
        functional: Whether nothing in the graph writes to memory.
    """
    constants = _lift(gm)
    places = gm.graph.find_nodes(op="placeholder")
    inputs = [_input_spec(node, state, node in constants) for node in places]
    results = cast("tuple[fx.Node, ...]", gm.graph.output_node().args[0])
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in results]
    taken = tuple(spec.arg for spec in inputs if spec.kind is InputKind.USER_INPUT)
    structure = ModuleCallSignature(
        [], [], pytree.tree_structure((taken, {})), pytree.tree_structure(tuple(results))
    )
    program = ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={name: value for name, value in state.values()},
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", structure)],
        constants={str(node.target): value for node, value in constants.items()},
        verifiers=[Verifier if functional else TrainingIRVerifier],
    )
    # What the capture assumed of sizes is in the shapes; as code it names the capture's arguments.
    program._guards_code = []
    return program


def _input_spec(node: fx.Node, state: State, is_constant: bool) -> InputSpec:
    argument = TensorArgument(node.name)
    if node.name in state:
        return InputSpec(InputKind.BUFFER, argument, state[node.name][0], persistent=True)
    if is_constant:
        return InputSpec(InputKind.CONSTANT_TENSOR, argument, str(node.target))
    return InputSpec(InputKind.USER_INPUT, argument, None)


def _lift(gm: fx.GraphModule) -> dict[fx.Node, torch.Tensor]:
    """Make inputs of the tensors that a graph holds; their values."""
    places: dict[str, fx.Node] = {}
    for node in list(gm.graph.find_nodes(op="get_attr")):
        name = str(node.target)
        tensor = getattr(gm, name)
        if not isinstance(tensor, torch.Tensor):
            continue
        if name not in places:
            with gm.graph.inserting_before():  # all others: the first node may be one of these
                places[name] = gm.graph.placeholder(name)
            places[name].meta = {"val": tensor, **node.meta}
        node.replace_all_uses_with(places[name])
        gm.graph.erase_node(node)
    return {place: getattr(gm, name) for name, place in places.items()}


def make_functional(
    program: ExportedProgram, opset: int, *, half_products: bool = False
) -> tuple[fx.GraphModule, State]:
    """The program as a functional ATen graph, and its state.

    Composite operators that are translated whole (``linear``, ``layer_norm``, attention) stay
    whole. Module paths and source lines stay on the nodes. What the model writes to, beside its
    results, is not returned: ``meta["writes"]`` names it. ``half_products`` as for
    :func:`mpgraph.onnx.composites.opened`.
    """
    table = opened(opset, half_products=half_products)
    try:
        with quiet(), whole_operators, unrolled_in_shape():
            made = program.run_decompositions(table)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ExportError(
            f"torch cannot make the graph functional: {type(error).__name__}: {first}"
        ) from error
    _drop_checks(made.graph)
    _refuse_effects(made.graph)
    gm = made.graph_module
    _keep_results(gm, made.graph_signature)
    state = _state_of(made)
    for node in gm.graph.nodes:
        node.meta["module_path"] = _module_path(node)
        if node.target in _VIEWS:
            # In fp32, an operator may lay its result out so that it cannot be viewed.
            node.target = torch.ops.aten.reshape.default
    gm.recompile()
    return gm, state


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


def _keep_results(gm: fx.GraphModule, signature: ExportGraphSignature) -> None:
    """Return what the model returns alone, and note what it writes to."""
    output = gm.graph.output_node()
    pairs = [*zip(cast(Any, output.args[0]), signature.output_specs, strict=True)]
    output.args = (tuple(n for n, spec in pairs if spec.kind is OutputKind.USER_OUTPUT),)
    others = [spec for _, spec in pairs if spec.kind is not OutputKind.USER_OUTPUT]
    gm.meta["writes"] = [spec.target for spec in others if spec.target is not None]


def _state_of(program: ExportedProgram) -> State:
    """For each placeholder that is no input, its name in the program and its value."""
    places = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    state: dict[str, tuple[str, torch.Tensor]] = {}
    for spec in program.graph_signature.input_specs:
        name = getattr(spec.arg, "name", "")
        if spec.kind is InputKind.TOKEN:
            program.graph.erase_node(places[name])
        elif spec.kind is not InputKind.USER_INPUT:
            assert spec.target is not None
            values = program.state_dict if spec.target in program.state_dict else program.constants
            state[name] = (spec.target, cast(torch.Tensor, values[spec.target]))
    return state


def _drop_checks(graph: fx.Graph) -> None:
    """Take out checks that a matrix is not singular: what is solved is infinite or NaN then."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.with_effects):
        if node.args[1] is torch.ops.aten._linalg_check_errors.default:
            for token in list(node.users):
                token.replace_all_uses_with(node.args[0])
                graph.erase_node(token)
            graph.erase_node(node)


def _refuse_effects(graph: fx.Graph) -> None:
    """Calls that are kept in order for what they do besides, such as raising errors."""
    kept = graph.find_nodes(op="call_function", target=torch.ops.higher_order.with_effects)
    if kept:
        names = ", ".join(sorted({str(node.args[1]) for node in kept}))
        raise ExportError(
            f"the model calls operators with side effects, which ONNX does not have: {names}"
        )


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix("model").removeprefix(".")


def describe_node(node: fx.Node) -> str:
    """Operator, node, module and the user's line, in one or two lines."""
    path, line = ir.module_path(node), ir.source_line(node)
    where = f" in module {path!r}" if path else ""
    return f"  {node.target} (%{node.name}{where})" + (f"\n    from: {line}" if line else "")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep notices of torch.onnx and its parts from the user: mpgraph reports what matters."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
