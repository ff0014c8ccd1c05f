"""Recurrent layers in traces: whole, by operators of mpgraph's, where torch would unroll them.

On a CPU, torch runs ``nn.GRU`` and its like as a loop over time, of which a trace makes thousands
of nodes; and the LSTM of oneDNN, for float32, has a gradient that cannot be traced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch._C import DispatchKey
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import _SingleLevelFunction

from mpgraph.python_kernels import PythonKernels
from mpgraph.recurrent_ops import (
    BACKWARD,
    FORWARD,
    NAMES,
    OVERLOADS,
    Options,
    arguments,
    count_states,
    fake_forward,
)

RECURRENT = {target: name for name, target in OVERLOADS.items()}
"""The names of torch's operators."""

_CALLED: dict[Any, str] = {**RECURRENT, **{getattr(torch, name): name for name in NAMES}}


class TwiceDifferentiated(Exception):
    """The gradient of a recurrent layer's gradient is wanted, which an operator does not have."""


@dataclasses.dataclass(frozen=True)
class Layers:
    """A call of one of torch's recurrent operators.

    Attributes:
        name: Which one; see :data:`mpgraph.recurrent_ops.NAMES`.
        tensors: Its input, initial states, and weights.
        options: What else it takes.
    """

    name: str
    tensors: list[torch.Tensor]
    options: Options

    @classmethod
    def of(cls, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Layers | None:
        """The call ``func(*args, **kwargs)``; None if it is another operator's."""
        name = _CALLED.get(func)
        # torch.gru(data, batch_sizes, hx, params, …) is of a packed sequence.
        if name is None or (len(args) > 3 and not isinstance(args[3], bool)):
            return None
        names = [argument.name for argument in OVERLOADS[name]._schema.arguments]
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        given = [values.pop(n) for n in names if n not in Options._fields]
        tensors = [t for v in given for t in ([v] if isinstance(v, torch.Tensor) else v)]
        return cls(name, tensors, Options(**values))

    @property
    def is_on_cpu(self) -> bool:
        """Elsewhere torch has kernels of its own for whole layers, such as cuDNN's."""
        return all(tensor.device.type == "cpu" for tensor in self.tensors)

    def whole(self) -> tuple[torch.Tensor, ...]:
        """Run it by operators that a trace keeps: its results, with a gradient."""
        records = torch.is_grad_enabled()
        wanted = [records and tensor.requires_grad for tensor in self.tensors]
        if any(wanted):
            found = cast(Any, _Differentiable).apply(self, wanted, *self.tensors)
        else:
            found = self.run(self.tensors, wanted)
        return tuple(found[: 1 + count_states(self.name)])

    def run(self, tensors: Sequence[torch.Tensor], wanted: list[bool]) -> Any:
        """Run the operator; see :data:`mpgraph.recurrent_ops.FORWARD`."""
        return FORWARD[self.name](list(tensors), *self.options, wanted, _next_number())

    def alike(self) -> list[torch.Tensor]:
        """Values like its results, all in the dtype of the input."""
        return fake_forward(self.name, self.tensors, self.options)

    def dtypes(self, kernel: Callable[..., Any]) -> list[torch.dtype]:
        """Those of its results, for which a kernel runs two steps in time."""
        device = self.tensors[0].device.type
        key = (
            *(self.name, self.options, self.tensors[0].requires_grad, device),
            *(tensor.dtype for tensor in self.tensors),
            *(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            torch.backends.mkldnn.enabled,
        )
        if key not in _dtypes:
            _dtypes[key] = [value.dtype for value in self._shortened(kernel)]
        return _dtypes[key]

    def _shortened(self, kernel: Callable[..., Any]) -> Any:
        data, *rest = self.tensors
        shape = [*data.shape]
        shape[1 if self.options.batch_first else 0] = 2
        short = data.new_empty(shape).requires_grad_(data.requires_grad)
        with torch.no_grad():
            return kernel(*arguments(self.name, [short, *rest], self.options))


_dtypes: dict[Any, list[torch.dtype]] = {}


class _Differentiable(_SingleLevelFunction):
    """A recurrent operator with its gradient, both as operators that a trace keeps."""

    @staticmethod
    def forward(ctx: Any, layers: Layers, wanted: list[bool], *tensors: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        *outputs, ctx.record = layers.run(tensors, wanted)
        ctx.wanted, ctx.transposed = wanted, wanted[0] and layers.options.batch_first
        chosen = [t for t, is_wanted in zip(tensors, wanted, strict=True) if is_wanted]
        ctx.shapes, ctx.dtype = [t.shape for t in chosen], chosen[0].dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise TwiceDifferentiated
        sizes = [size for shape in ctx.shapes for size in shape]
        dims = [len(shape) for shape in ctx.shapes]
        found = iter(BACKWARD(ctx.record, list(gradients), sizes, dims, ctx.dtype, ctx.transposed))
        return None, None, *(next(found) if wanted else None for wanted in ctx.wanted)


_local = threading.local()


def _next_number() -> int:
    _local.last = getattr(_local, "last", 0) + 1
    return int(_local.last)


@contextlib.contextmanager
def kept_whole(kept: bool) -> Iterator[None]:
    """Let :func:`run` keep recurrent layers whole, numbered from one; or not, inside of that."""
    before = vars(_local).copy()
    _local.last, _local.kept = 0, kept and getattr(_local, "kept", True)
    try:
        yield
    finally:
        vars(_local).clear()
        vars(_local).update(before)


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a function of torch's in a trace with gradients: recurrent layers in a way that has one.

    On a CPU they are kept whole, or unrolled without oneDNN.

    Raises:
        TwiceDifferentiated: In a backward pass, if a layer that was kept whole is to have more
            than a first gradient. Trace again, with ``kept_whole(False)``.
    """
    layers = Layers.of(func, args, kwargs)
    if layers is None or not layers.is_on_cpu:
        return func(*args, **kwargs)
    if getattr(_local, "kept", True) and not torch._C._are_functorch_transforms_active():
        return layers.whole()
    with without_onednn():
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Let torch run its own kernels on a CPU."""
    with _switched_off(torch.backends.mkldnn):
        yield


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """Let torch run its own kernels on a GPU."""
    with _switched_off(torch.backends.cudnn):
        yield


@contextlib.contextmanager
def _switched_off(library: Any) -> Iterator[None]:
    before, library.enabled = library.enabled, False
    try:
        yield
    finally:
        library.enabled = before


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


def _looked_at(target: OpOverload) -> Callable[..., Any]:
    """What the operator yields on fake values, told by two steps in time instead of all."""
    unrolled = target.py_kernels[_KEY]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        layers = Layers.of(target, args, kwargs)
        assert layers is not None
        is_fake = any(isinstance(tensor, FakeTensor) for tensor in layers.tensors)
        is_plain = is_fake and layers.is_on_cpu
        if not is_plain or torch._C._are_functorch_transforms_active():
            return unrolled(*args, **kwargs)
        dtypes = layers.dtypes(unrolled)

        def make() -> tuple[torch.Tensor, ...]:
            return tuple(v.to(d) for v, d in zip(layers.alike(), dtypes, strict=True))

        return _stand(make, *layers.tensors)

    return kernel


looked_at = PythonKernels({target: _looked_at(target) for target in RECURRENT}, _KEY)
"""While this is active, recurrent layers on fake tensors are not unrolled over time."""


def _in_shape(unrolled: Callable[..., Any]) -> Callable[..., Any]:
    """The LSTM loop of torch, with final states shaped like the initial ones.

    torch 2.11's has a dimension too many there, unless the batch is a single sequence.
    """

    def kernel(data: torch.Tensor, states: Sequence[torch.Tensor], *rest: Any, **more: Any) -> Any:
        output, *last = unrolled(data, states, *rest, **more)
        pairs = zip(last, states, strict=True)
        return output, *(a if a.dim() == b.dim() else a.reshape(b.shape) for a, b in pairs)

    return kernel


_LSTM = OVERLOADS["lstm"]
_loop = _in_shape(_LSTM.py_kernels[_KEY])
_loops = PythonKernels({_LSTM: _loop}, _KEY)


@contextlib.contextmanager
def unrolled_in_shape() -> Iterator[None]:
    """Let an LSTM that is unrolled yield what a whole one does, on fake values too."""
    before = decomposition_table[_LSTM]  # which fake values go by
    with _loops:
        decomposition_table[_LSTM] = _loop
        try:
            yield
        finally:
            decomposition_table[_LSTM] = before
