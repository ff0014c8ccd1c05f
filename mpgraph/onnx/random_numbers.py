"""Random numbers: an inference file draws none."""

from __future__ import annotations

from torch import fx

from mpgraph import ir
from mpgraph.errors import ExportError
from mpgraph.onnx.program import describe_node

# Operators that may draw random numbers, and do so where this argument is true.
_DRAWN_IF = {
    "dropout": "train",
    "feature_dropout": "train",
    "native_dropout": "train",
    "rrelu_with_noise_functional": "training",
    "scaled_dot_product_attention": "dropout_p",
    "lstm": "dropout",
    "gru": "dropout",
    "rnn_tanh": "dropout",
    "rnn_relu": "dropout",
}


def refuse_random(graph: fx.Graph) -> None:
    """Check that a graph draws no random numbers.

    Raises:
        ExportError: It does; names the operators, the nodes and the user's lines.
    """
    random = [node for node in graph.nodes if draws_random_numbers(node)]
    if random:
        raise ExportError(
            "the model draws random numbers, which no runtime draws as torch does:\n"
            + "\n".join(map(describe_node, random))
            + "\nTake the noise as an input, or leave it out in eval mode."
        )


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether the node draws random numbers, given its arguments."""
    if not ir.is_random(node):
        return False
    schema = node.target._schema  # type: ignore[union-attr]
    switch = _DRAWN_IF.get(schema.name.partition("::")[2])
    if switch is None:
        return True
    names = [argument.name for argument in schema.arguments]
    values = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return bool(values.get(switch)) and values.get("train", True) is not False
