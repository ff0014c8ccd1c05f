"""Operators that run recurrent layers whole, and keep what autograd has recorded of them.

``mpgraph::lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu`` run torch's own operators of these names,
and ``mpgraph::recurrent_backward`` what autograd has recorded of such a call: the same bits as in
eager mode. They are for graphs that hold the backward pass as well; by themselves they have no
gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch._ops import OpOverload
from torch.autograd.graph import get_gradient_edge

aten = torch.ops.aten
Tensors = Sequence[torch.Tensor]

NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""The operators of torch that run a recurrent layer, or several upon each other."""


class Options(NamedTuple):
    """What torch's recurrent operators take besides tensors, in their order."""

    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool


OVERLOADS: dict[str, OpOverload] = {name: getattr(aten, name).input for name in NAMES}
"""They, for sequences of one length: packed ones need values while they are traced."""


def count_states(name: str) -> int:
    """How many states a layer has: an LSTM's has two parts."""
    return 2 if name == "lstm" else 1


def arguments(name: str, tensors: Tensors, options: Options) -> list[Any]:
    """The arguments of torch's own operator, from its tensors in one list."""
    last = 1 + count_states(name)
    states = [*tensors[1:last]] if name == "lstm" else tensors[1]
    return [tensors[0], states, [*tensors[last:]], *options]


@dataclasses.dataclass
class _Record:
    """What autograd has recorded of a call: it lives as long as the tensor that it is kept on.

    Attributes:
        edges: Where the gradient of each output enters.
        inputs: The inputs that gradients are wanted of.
    """

    edges: list[Any]
    inputs: list[torch.Tensor]


def _forward(name: str) -> Callable[..., Any]:
    def run(tensors: Tensors, *rest: Any) -> Any:
        *chosen, wanted, _ = rest
        options = Options(*chosen)
        own = [_own(t).requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        with torch.set_grad_enabled(any(wanted)):
            found: Any = OVERLOADS[name](*arguments(name, own, options))
        record: Any = torch.zeros((), dtype=torch.int64)
        if any(wanted):
            inputs = [tensor for tensor in own if tensor.requires_grad]
            record.record = _Record([*map(get_gradient_edge, found)], inputs)
        output, *states = (value.detach().clone() for value in found)  # the record may hold them
        kept = [state.contiguous() for state in states]
        return _laid(output, options.batch_first), *_two(kept, output), record

    return run


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """What nobody writes to before the backward pass: a compiled graph uses memory again.

    A parameter is written by the optimizer's update, after that.
    """
    return tensor.detach() if isinstance(tensor, torch.nn.Parameter) else tensor.detach().clone()


def _two(states: list[torch.Tensor], like: torch.Tensor) -> list[torch.Tensor]:
    return states if len(states) == 2 else [*states, like.new_empty(0)]


def _laid(value: torch.Tensor, batch_first: bool) -> torch.Tensor:
    """The value as torch's kernels lay it out: time before batch."""
    return value.transpose(0, 1).contiguous().transpose(0, 1) if batch_first else value.contiguous()


def fake_forward(name: str, tensors: Tensors, options: Options) -> list[torch.Tensor]:
    """Values like the results of torch's operator."""
    data, states = tensors[0], tensors[1 : 1 + count_states(name)]
    outer = [*data.shape[:-1]]
    width = states[0].shape[-1] * (2 if options.bidirectional else 1)
    if options.batch_first:
        outer.reverse()
    output = data.new_empty([*outer, width])
    output = output.transpose(0, 1) if options.batch_first else output
    return [output, *(state.new_empty(state.shape) for state in states)]


def _fake_forward(name: str) -> Callable[..., Any]:
    def run(tensors: Tensors, *rest: Any) -> Any:
        output, *states = fake_forward(name, tensors, Options(*rest[:-2]))
        return output, *_two(states, output), output.new_empty((), dtype=torch.int64)

    return run


def _backward(
    record: torch.Tensor,
    gradients: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
    dims: Sequence[int],
    dtype: torch.dtype,
    transposed: bool,
) -> list[torch.Tensor]:
    kept: _Record = record.record  # type: ignore[attr-defined]
    pairs = zip(kept.edges, gradients, strict=False)
    edges, given = zip(*((e, g) for e, g in pairs if g is not None), strict=True)
    # A loss may be differentiated more than once: the record stays until its tensor goes.
    found = torch.autograd.grad(
        edges, kept.inputs, given, retain_graph=True, materialize_grads=True
    )
    return [_laid(g, transposed and i == 0) for i, g in enumerate(found)]


def _fake_backward(
    record: torch.Tensor,
    gradients: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
    dims: Sequence[int],
    dtype: torch.dtype,
    transposed: bool,
) -> list[torch.Tensor]:
    rest = iter(sizes)
    made = [record.new_empty([next(rest) for _ in range(dim)], dtype=dtype) for dim in dims]
    if transposed:
        time_first = made[0].transpose(0, 1).shape
        made[0] = record.new_empty(time_first, dtype=dtype).transpose(0, 1)
    return made


_library: Any = cast(Any, torch.library).Library("mpgraph", "FRAGMENT")
_FORWARD = (
    "(Tensor[] tensors, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first, bool[] wanted, int call) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor record, Tensor?[] gradients, SymInt[] sizes, int[] dims, ScalarType dtype, "
    "bool transposed) -> Tensor[]"
)


def _define(name: str, schema: str, kernel: Any, fake: Any) -> OpOverload:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    # Or autograd would be off inside of the kernels.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"mpgraph::{name}", fake, lib=_library)
    return cast(OpOverload, getattr(torch.ops.mpgraph, name).default)


FORWARD = {name: _define(name, _FORWARD, _forward(name), _fake_forward(name)) for name in NAMES}
"""By name, what runs layers.

They take tensors (input, states, weights), :class:`Options`, which tensors gradients are wanted of,
and a number that tells calls apart: what draws dropout's numbers and keeps a record is not to be
merged. They yield the output, two states (the second is empty but for an LSTM) and the record."""

BACKWARD = _define("recurrent_backward", _BACKWARD, _backward, _fake_backward)
"""The gradients that were wanted, from the record and a gradient, or None, per result.

It also takes the shapes of what it yields: all sizes, how many belong to each, the dtype, and
whether the first is laid out with time before batch, as the input is with ``batch_first``."""
