"""Recurrent layers as one operator each, in a graph that holds the backward pass too.

torch runs ``nn.GRU`` and its like on a CPU as a loop over time, which a trace would unroll into
thousands of nodes, and the LSTM of oneDNN (fp32) cannot be traced with its gradient at all. Here
each layer stack is an operator, ``mpgraph::gru`` and so on, that runs torch's own kernels and keeps
what autograd has recorded of them, and ``mpgraph::recurrent_backward``, which runs that: the
same bits as in the loop that a step replaces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import get_gradient_edge

from mpgraph.python_kernels import PythonKernels

aten = torch.ops.aten
Tensors = Sequence[torch.Tensor]

NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
"""The operators of torch that run a recurrent layer, or several upon each other."""


class TwiceDifferentiated(Exception):
    """The gradient of a recurrent layer's gradient is wanted, which one operator does not have."""


@dataclasses.dataclass(frozen=True)
class Layers:
    """A call of one of torch's recurrent operators.

    Attributes:
        name: Which one; see :data:`NAMES`.
        packed: Whether it takes a packed sequence.
        tensors: Its input, the batch sizes of a packed sequence, initial states, and weights.
        options: has_biases, num_layers, dropout, train, bidirectional and batch_first.
    """

    name: str
    packed: bool
    tensors: list[torch.Tensor]
    options: tuple[Any, ...]

    @classmethod
    def of(cls, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Layers | None:
        """The call ``func(*args, **kwargs)``; None if it is another operator's."""
        name = _CALLED.get(func)
        if name is None:
            return None
        # gru(input, hx, params, has_biases, …) or gru(data, batch_sizes, hx, params, …)
        packed = "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
        values = _in_order(_overload(name, packed), args, kwargs)
        options = [value for value in values if isinstance(value, (bool, int, float))]
        tensors = _flat([value for value in values if not isinstance(value, (bool, int, float))])
        return cls(name, packed, tensors, (*options, *([False] if packed else [])))

    @property
    def on_cpu(self) -> bool:
        """Elsewhere torch has kernels of its own for whole layers, such as cuDNN's."""
        return all(tensor.device.type == "cpu" for tensor in self.tensors)

    def __call__(self) -> Any:
        """Run it, by an operator of mpgraph's."""
        floating = [tensor.is_floating_point() for tensor in self.tensors]
        records = torch.is_grad_enabled()
        wanted = [
            records and is_float and tensor.requires_grad
            for is_float, tensor in zip(floating, self.tensors, strict=True)
        ]
        outputs = (
            cast(Any, _Differentiable).apply(self, wanted, *self.tensors)
            if any(wanted)
            else self._run(self.tensors, wanted)
        )
        return tuple(outputs[: _outputs(self.name)])

    def alike(self) -> Any:
        """Values like its results."""
        found = _fake(
            self.tensors, self.packed, *self.options, [], 0, count=_outputs(self.name) - 1
        )
        return found[: _outputs(self.name)]

    def shortened(self, kernel: Callable[..., Any]) -> Any:
        """Run two steps in time of it by a kernel, on values without content."""
        data, *rest = self.tensors
        shape = [2, *data.shape[1:]] if not self.options[-1] else [data.shape[0], 2, data.shape[2]]
        short = data.new_empty(shape).requires_grad_(data.requires_grad)
        return kernel(*_arguments(self.name, [short, *rest], self.packed, self.options))

    def _run(self, tensors: Tensors, wanted: list[bool]) -> tuple[torch.Tensor, ...]:
        operator = getattr(torch.ops.mpgraph, self.name).default
        call = _next_number()
        return cast(Any, operator(list(tensors), self.packed, *self.options, wanted, call))


class _Differentiable(_SingleLevelFunction):
    """A recurrent operator with its gradient, both as operators that a trace keeps."""

    @staticmethod
    def forward(ctx: Any, layers: Layers, wanted: list[bool], *tensors: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        *outputs, ctx.record = layers._run(tensors, wanted)
        ctx.wanted, ctx.batch_first = wanted, layers.options[-1]
        chosen = [t for t, is_wanted in zip(tensors, wanted, strict=True) if is_wanted]
        ctx.shapes, ctx.dtype = [t.shape for t in chosen], chosen[0].dtype
        ctx.input_first = wanted[0]
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise TwiceDifferentiated
        sizes = [size for shape in ctx.shapes for size in shape]
        dims = [len(shape) for shape in ctx.shapes]
        transposed = ctx.input_first and ctx.batch_first
        found = iter(_BACKWARD(ctx.record, list(gradients), sizes, dims, ctx.dtype, transposed))
        return None, None, *[next(found) if wanted else None for wanted in ctx.wanted]


def _overload(name: str, packed: bool) -> OpOverload:
    return cast(OpOverload, getattr(getattr(aten, name), "data" if packed else "input"))


_CALLED: dict[Any, str] = {
    called: name
    for name in NAMES
    for called in (getattr(torch, name), _overload(name, False), _overload(name, True))
}


def _in_order(target: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    names = [argument.name for argument in target._schema.arguments]
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    return [values[name] for name in names]


def _flat(values: Sequence[Any]) -> list[torch.Tensor]:
    return [t for v in values for t in ([v] if isinstance(v, torch.Tensor) else v)]


def _outputs(name: str) -> int:
    return 3 if name == "lstm" else 2


_local = threading.local()


def _next_number() -> int:
    """Tells calls apart: what draws dropout's numbers anew, or keeps its own record, is not one."""
    _local.last = getattr(_local, "last", 0) + 1
    return int(_local.last)


@contextlib.contextmanager
def kept_whole(kept: bool) -> Iterator[None]:
    """Trace recurrent layers as one operator each, numbered from one; or not, inside of that."""
    before = vars(_local).copy()
    _local.last, _local.kept = 0, kept and getattr(_local, "kept", True)
    try:
        yield
    finally:
        vars(_local).clear()
        vars(_local).update(before)


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run a function of torch's in a trace with gradients: recurrent layers in a way that has one.

    Unrolled, they run without oneDNN, whose LSTM has a gradient that cannot be traced.
    """
    layers = Layers.of(func, args, kwargs)
    if layers is None or not layers.on_cpu:
        return func(*args, **kwargs)
    if getattr(_local, "kept", True) and not torch._C._are_functorch_transforms_active():
        return layers()
    with torch.backends.mkldnn.flags(enabled=False):
        return func(*args, **kwargs)


def _arguments(name: str, tensors: Tensors, packed: bool, options: Sequence[Any]) -> list[Any]:
    """The arguments of torch's own operator, of tensors that lie in one list."""
    first, rest = 2 if packed else 1, 2 if name == "lstm" else 1
    states = list(tensors[first : first + rest])
    given = [*tensors[:first], states if name == "lstm" else states[0], [*tensors[first + rest :]]]
    return [*given, *(options[:-1] if packed else options)]


class _Stands(_SingleLevelFunction):
    """Values without content that require a gradient as what they stand for would."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], tuple[torch.Tensor, ...]], *_: torch.Tensor) -> Any:
        return make()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("values of a capture are not differentiated")


# Taken early: a capture refuses custom Functions by another ``apply``.
_stand = cast(Any, _Stands).apply


# torch takes the kernel for this key where there is one for that of autograd as well.
_KEY = DispatchKey.CompositeImplicitAutograd


def _looked_at(overload: OpOverload) -> Callable[..., Any]:
    """What the operator yields on fake values, told by two steps in time instead of all."""
    unrolled = overload.py_kernels[_KEY]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        layers = Layers.of(overload, args, kwargs)
        assert layers is not None
        is_fake = any(isinstance(tensor, FakeTensor) for tensor in layers.tensors)
        if not is_fake or torch._C._are_functorch_transforms_active():
            return unrolled(*args, **kwargs)
        with torch.no_grad():
            dtypes = [value.dtype for value in layers.shortened(unrolled)]

        def make() -> tuple[torch.Tensor, ...]:
            return tuple(v.to(d) for v, d in zip(layers.alike(), dtypes, strict=False))

        return _stand(make, *layers.tensors)

    return kernel


RECURRENT = frozenset(_overload(name, False) for name in NAMES)
looked_at = PythonKernels({overload: _looked_at(overload) for overload in RECURRENT}, _KEY)
"""While this is active, recurrent layers on fake tensors are not unrolled over time."""


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
    def run(
        tensors: list[torch.Tensor],
        packed: bool,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
        wanted: list[bool],
        call: int,
    ) -> Any:
        options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
        own = [_own(t).requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        with torch.set_grad_enabled(any(wanted)):
            found = _overload(name, packed)(*_arguments(name, own, packed, options))
        record = torch.zeros((), dtype=torch.int64)
        if any(wanted):
            inputs = [t for t in own if t.requires_grad]
            record.record = _Record([*map(get_gradient_edge, found)], inputs)  # type: ignore[attr-defined]
        output = _laid(found[0].detach(), batch_first, always=True)
        states = [_laid(state.detach(), False, always=True) for state in found[1:]]
        return output, *_three(states, output), record

    return run


def _three(states: list[torch.Tensor], output: torch.Tensor) -> list[torch.Tensor]:
    """Two states, of which only an LSTM has the second."""
    return states if len(states) == 2 else [*states, output.new_empty(0)]


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """What nobody writes to before the backward pass: a compiled graph reuses its memory.

    A parameter is written by the optimizer's update, after that.
    """
    return tensor.detach() if isinstance(tensor, torch.nn.Parameter) else tensor.detach().clone()


def _laid(value: torch.Tensor, batch_first: bool, *, always: bool = False) -> torch.Tensor:
    """The value as torch's kernels lay it out: time before batch, contiguous."""
    swapped = value.transpose(0, 1) if batch_first else value
    kept = swapped.contiguous()
    if always and kept.data_ptr() == value.data_ptr():
        kept = kept.clone()  # the record may hold it
    return kept.transpose(0, 1) if batch_first else kept


def _fake(
    tensors: list[torch.Tensor],
    packed: bool,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    wanted: list[bool],
    call: int,
    *,
    count: int,
) -> Any:
    data, states = tensors[0], tensors[2 if packed else 1 :][:count]
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    swap = (1, 0) if batch_first else (0, 1)
    outer = [data.shape[0]] if packed else [data.shape[i] for i in swap]
    output = data.new_empty([*outer, width])
    output = output.transpose(0, 1) if batch_first else output
    kept = [state.new_empty(state.shape) for state in states]
    return output, *_three(kept, data), data.new_empty((), dtype=torch.int64)


def _backward(
    record: torch.Tensor,
    gradients: list[torch.Tensor | None],
    sizes: list[int],
    dims: list[int],
    dtype: torch.dtype,
    transposed: bool,
) -> list[torch.Tensor]:
    kept: _Record = record.record  # type: ignore[attr-defined]
    pairs = [(e, g) for e, g in zip(kept.edges, gradients, strict=False) if g is not None]
    edges, given = zip(*pairs, strict=True)
    # A loss may be differentiated more than once: the record stays.
    found = torch.autograd.grad(
        edges, kept.inputs, given, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return [_laid(g, transposed and i == 0) for i, g in enumerate(found)]


def _fake_backward(
    record: torch.Tensor,
    gradients: list[torch.Tensor | None],
    sizes: list[int],
    dims: list[int],
    dtype: torch.dtype,
    transposed: bool,
) -> list[torch.Tensor]:
    rest = iter(sizes)
    shapes = [[next(rest) for _ in range(dim)] for dim in dims]
    made = [record.new_empty(shape, dtype=dtype) for shape in shapes]
    if transposed:
        made[0] = record.new_empty([shapes[0][i] for i in (1, 0, 2)], dtype=dtype).transpose(0, 1)
    return made


_library: Any = cast(Any, torch.library).Library("mpgraph", "FRAGMENT")
_SCHEMA = (
    "(Tensor[] tensors, bool packed, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first, bool[] wanted, int call) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _define(name: str, schema: str, kernel: Any, fake: Any) -> OpOverload:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"mpgraph::{name}", fake, lib=_library)
    return cast(OpOverload, getattr(torch.ops.mpgraph, name).default)


def _fake_of(name: str) -> Any:
    count = _outputs(name) - 1
    return lambda *args, **kwargs: _fake(*args, **kwargs, count=count)


for _name in NAMES:
    _define(_name, _SCHEMA, _forward(_name), _fake_of(_name))
_BACKWARD = _define(
    "recurrent_backward",
    "(Tensor record, Tensor?[] gradients, SymInt[] sizes, int[] dims, ScalarType dtype, "
    "bool transposed) -> Tensor[]",
    _backward,
    _fake_backward,
)
