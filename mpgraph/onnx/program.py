"""A graph as a ``torch.export.ExportedProgram``, and the functional graph that ONNX is made of."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from mpgraph.onnx.decompositions import (
    decompositions,
    draws_random_numbers,
    has_translation,
)

State = Mapping[str, tuple[str, torch.Tensor]]


class _Decomposed(ExportedProgram):
    """A program that is functional already: torch.onnx would trace it once more for nothing."""

    def run_decompositions(self, *args: Any, **kwargs: Any) -> ExportedProgram:
        return self


def exported_program(
    gm: fx.GraphModule, state: State, examples: Sequence[torch.Tensor], *, functional: bool
) -> ExportedProgram:
    """The graph as a program.

    Args:
        gm: A flat graph that returns a tuple of tensors, with ``meta["val"]`` on every node.
        state: For each placeholder that is no input, by its name: the name and the value that it
            has in the program.
        examples: A value per input.
        functional: Whether nothing in the graph writes to memory.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    results = cast("tuple[fx.Node, ...]", gm.graph.output_node().args[0])
    inputs = [_input_spec(node, state) for node in placeholders]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in results]
    structure = ModuleCallSignature(
        [], [],
        pytree.tree_structure((tuple(examples), {})),
        pytree.tree_structure(tuple(results)),
    )  # fmt: skip
    program = (_Decomposed if functional else ExportedProgram)(
        root=gm,
        graph=gm.graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={name: value for name, value in state.values()},
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", structure)],
        example_inputs=(tuple(examples), {}),
        constants={},
        verifiers=[Verifier if functional else TrainingIRVerifier],
    )
    # What the capture assumed of sizes is in the shapes; as code it names the capture's arguments.
    program._guards_code = []
    return program


def _input_spec(node: fx.Node, state: State) -> InputSpec:
    argument = TensorArgument(node.name)
    if node.name not in state:
        return InputSpec(InputKind.USER_INPUT, argument, None)
    return InputSpec(InputKind.BUFFER, argument, state[node.name][0], persistent=True)


def make_functional(
    program: ExportedProgram, *, half_products: bool = False
) -> tuple[fx.GraphModule, State]:
    """The program as a functional ATen graph of what torch.onnx translates, and its state.

    Operators that torch.onnx translates whole (``linear``, ``layer_norm``, attention) stay whole.
    Module paths and source lines stay on the nodes. What the model writes to, beside its results,
    is not returned: ``meta["writes"]`` names it. ``half_products`` as for
    :func:`mpgraph.onnx.decompositions.decompositions`.
    """
    table = decompositions(half_products=half_products)
    try:
        with quiet():
            made = program.run_decompositions(table)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ExportError(
            f"torch cannot make the graph functional: {type(error).__name__}: {first}"
        ) from error
    _refuse_effects(made.graph)
    signature, gm = made.graph_signature, made.graph_module
    results = gm.graph.output_node().args[0]
    kept = [
        node
        for node, spec in zip(cast(Any, results), signature.output_specs, strict=True)
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    gm.graph.output_node().args = (tuple(kept),)
    gm.meta["writes"] = [
        spec.target
        for spec in signature.output_specs
        if spec.kind is not OutputKind.USER_OUTPUT and spec.target is not None
    ]
    state: dict[str, tuple[str, torch.Tensor]] = {}
    for spec in signature.input_specs:
        name = getattr(spec.arg, "name", "")
        if spec.kind is not InputKind.USER_INPUT:
            assert spec.target is not None
            values = made.state_dict if spec.target in made.state_dict else made.constants
            state[name] = (spec.target, cast(torch.Tensor, values[spec.target]))
    for node in gm.graph.nodes:
        node.meta["module_path"] = _module_path(node)
        if node.target in _VIEWS:
            # In fp32, an operator may lay its result out so that it cannot be viewed.
            node.target = torch.ops.aten.reshape.default
    gm.recompile()
    return gm, state


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


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


def refuse_untranslated(graph: fx.Graph) -> None:
    """Check that torch.onnx has a translation for every operator of a functional graph.

    Raises:
        ExportError: It has not, or the operator draws random numbers; names the operators, the
            nodes and the user's lines.
    """
    random = [node for node in graph.nodes if draws_random_numbers(node)]
    if random:
        raise ExportError(
            "the model draws random numbers, which no runtime draws as torch does:\n"
            + "\n".join(map(describe_node, random))
            + "\nTake the noise as an input, or leave it out in eval mode."
        )
    lacking = [n for n in graph.nodes if ir.is_operator(n) and not has_translation(n)]
    if lacking:
        raise ExportError(
            "torch.onnx has no translation for:\n"
            + "\n".join(dict.fromkeys(map(describe_node, lacking)))
            + "\nWrite that part of the model with other operators, or export the model without it."
        )


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
