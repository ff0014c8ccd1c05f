"""One training step, replayed without leaving a trace on the model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mpgraph.capture.undo import Before
from mpgraph.errors import MPGraphError
from mpgraph.finding import converted_modules
from mpgraph.module import state_of
from mpgraph.ranges.measure import measure
from mpgraph.ranges.watch import Run, Watch, is_floating
from mpgraph.structure import flatten
from mpgraph.uncompiled import uncompiled

# What a step gives to differentiate: tensors, and the gradient to begin with at each.
Seeds = list[tuple[torch.Tensor, torch.Tensor | None]]


@dataclasses.dataclass(frozen=True)
class Step:
    """What to replay.

    Attributes:
        model: What is called: a converted model, or one with converted models in it.
        call: Runs the forward pass.
        seeds: What to differentiate in its result; [] if nothing is known to be.
        arguments: What the call is given.
    """

    model: nn.Module
    call: Callable[[], Any]
    seeds: Callable[[Any], Seeds]
    arguments: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a replay has shown.

    Attributes:
        runs: The runs of the step's graphs, in order.
        entries: The kinds of call that they belong to.
        loss: The loss, where it is one number.
        bad_results: Values that are infinite or NaN in the model's result.
        bad_loss: The same, in what is differentiated.
        bad_gradients: The same, in the gradients of parameters and inputs.
        has_backward: Whether there was a backward pass.
    """

    runs: list[Run]
    entries: list[Any]
    loss: float | None = None
    bad_results: int = 0
    bad_loss: int = 0
    bad_gradients: int = 0
    has_backward: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether an optimizer could take the step."""
        return not (self.bad_loss or self.bad_gradients)


def replay(step: Step, *, true: bool = False) -> Trace:
    """Run a step and leave everything as it was; with ``true``, in fp32 throughout."""
    states = [state_of(model) for model in converted_modules(step.model).values()]
    with (
        untouched(step.model, step.arguments),
        uncompiled(step.model),
        Watch(true=true).active(states) as watch,
    ):
        result = step.call()
        seeds = step.seeds(result)
        trace = Trace(
            watch.runs, watch.entries, _number(seeds), _bad(flatten(result)[0]),
            _bad(value for pair in seeds for value in pair),
        )  # fmt: skip
        seeds = [(value, gradient) for value, gradient in seeds if value.requires_grad]
        if not seeds or (trace.bad_loss and not true):
            return trace
        gradients = _gradients(seeds, _sources(step))
        return dataclasses.replace(trace, bad_gradients=_bad(gradients), has_backward=True)


def _number(seeds: Seeds) -> float | None:
    if len(seeds) == 1 and seeds[0][1] is None:
        return float(seeds[0][0].detach())
    return None


def _bad(values: Iterable[Any]) -> int:
    tensors = (v for v in values if isinstance(v, torch.Tensor) and is_floating(v))
    return sum(measure(value).bad for value in tensors)


def _sources(step: Step) -> list[torch.Tensor]:
    """The leaves whose gradients a backward pass would compute."""
    given = [leaf for argument in step.arguments for leaf in flatten(argument)[0]]
    leaves = [v for v in (*step.model.parameters(), *given) if isinstance(v, torch.Tensor)]
    wanted = (leaf for leaf in leaves if leaf.requires_grad and leaf.is_leaf)
    return list({id(leaf): leaf for leaf in wanted}.values())


def _gradients(seeds: Seeds, sources: list[torch.Tensor]) -> list[Any]:
    """Differentiate without adding to any ``.grad``."""
    values = [value for value, _ in seeds]
    starts = [gradient for _, gradient in seeds]
    if not sources:
        return []
    try:
        return list(
            torch.autograd.grad(values, sources, starts, retain_graph=True, allow_unused=True)
        )
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
    return _added_gradients(values, sources, starts)


def _added_gradients(values: Any, sources: list[torch.Tensor], starts: Any) -> list[Any]:
    """The same where ``torch.autograd.grad`` is refused: at a reentrant checkpoint."""
    before = [source.grad for source in sources]
    for source in sources:
        source.grad = None
    try:
        torch.autograd.backward(values, starts)
        return [source.grad for source in sources]
    finally:
        for source, gradient in zip(sources, before, strict=True):
            source.grad = gradient


@contextlib.contextmanager
def untouched(model: nn.Module, arguments: Iterable[Any] = ()) -> Iterator[None]:
    """Put everything back that a call of the model changes: buffers, attributes, random states.

    Parameters are not: a forward pass that writes to its own parameters is not taken back.
    """
    state = Before(model, arguments)
    tensors = [(t, t.detach().clone()) for t in _changeable(model)]
    scales = [state_of(inner).scale for inner in converted_modules(model).values()]
    before = [dict(vars(scale)) for scale in scales]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with (
        torch.random.fork_rng(sorted(devices)),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        try:
            yield
        finally:
            state.restore()
            for tensor, value in tensors:
                _put_back(tensor, value)
            for scale, fields in zip(scales, before, strict=True):
                vars(scale).update(fields)


def _put_back(tensor: torch.Tensor, value: torch.Tensor) -> None:
    # Batch norm writes its statistics without moving their version counter: neither do we, or a
    # backward pass that the user has yet to run would refuse them.
    if not torch.equal(tensor, value):
        tensor.data.copy_(value)


def _changeable(model: nn.Module) -> list[torch.Tensor]:
    """Buffers, and tensors that are plain attributes of modules."""
    found = (v for m in model.modules() for v in (*m._buffers.values(), *vars(m).values()))
    tensors = {id(v): v for v in found if isinstance(v, torch.Tensor)}
    return [tensor for tensor in tensors.values() if not tensor.is_inference()]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper or DistributedDataParallel.

    A replay looks at every value by itself, and is one rank's own affair.
    """
    name = _WRAPPED.get(type(model).__name__)
    inner = getattr(model, name) if name is not None else None
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


_WRAPPED = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def loss_seeds(loss_fn: Callable[[Any], Any] | None) -> Callable[[Any], Seeds]:
    """What to differentiate: ``loss_fn(outputs)``, or the loss that the model returns.

    Raises:
        MPGraphError: (when called) ``loss_fn`` gives something else than one number.
    """

    def seeds(outputs: Any) -> Seeds:
        loss = loss_in(outputs) if loss_fn is None else loss_fn(outputs)
        if loss_fn is None and loss is None:
            return []
        return [(checked_loss(loss), None)]

    return seeds


def checked_loss(loss: Any) -> torch.Tensor:
    """A loss that can be differentiated."""
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else loss
    raise MPGraphError(
        f"the loss must be one number, to be differentiated: loss_fn gave {found!r}. Reduce it, as "
        "in loss_fn=lambda outputs: F.cross_entropy(outputs, target)."
    )


def loss_in(outputs: Any) -> torch.Tensor | None:
    """The loss among a model's results: the result itself if it is one number, or its ``loss``."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else None
    for value in (outputs, found, getattr(outputs, "loss", None)):
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            return value
    return None
