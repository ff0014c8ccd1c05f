"""The converted module: the user's class with another ``forward``."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from mpgraph.errors import CaptureError, MPGraphError
from mpgraph.loss_scale import CurrentScale, LossScale
from mpgraph.module_tree import ModuleTree
from mpgraph.pipeline import PassContext
from mpgraph.plain import STATE, global_hooks
from mpgraph.policy import Policy
from mpgraph.precision import Precision
from mpgraph.signature import Signature
from mpgraph.structure import Spec, flatten, same_leaves
from mpgraph.tracing import local, lock, tracing
from mpgraph.warn import warn
from mpgraph.weights import WeightCopies, is_trainable_leaf


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ``convert`` was asked for."""

    precision: Precision
    policy: Policy
    capture: str
    device: str
    max_graphs: int = 64

    @property
    def scaled(self) -> bool:
        """Whether some gradients are in fp16, and need a loss scale."""
        runs = [override.run for override in self.policy.overrides]
        return self.precision.compute is torch.float16 or "fp16" in runs


class MixedPrecision:
    """Mixed into the class of every converted module; ``isinstance`` tells converted ones."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        original = state_of(self).original
        # As nn.Module does: a copy of a compiled module is not compiled.
        kept = {k: v for k, v in vars(self).items() if k != "_compiled_call_impl"}
        return _rebuild, (original,), kept

    def __setstate__(self, state: Any) -> None:
        cast(Any, super()).__setstate__(state)
        state_of(self).belongs_to(cast(nn.Module, self))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What moves a module, by itself or as a part of another: the loss scale goes along."""
        result = cast(Any, super())._apply(*args, **kwargs)
        if isinstance(state := vars(self).get(STATE), State):
            state.settle(cast(nn.Module, self))
        return result


def _rebuild(original: type[nn.Module]) -> Any:
    cls = converted_class(original)
    return object.__new__(cls)


def converted_class(original: type[nn.Module]) -> type[Any]:
    """A subclass of ``original`` whose ``forward`` runs the rewritten graph; one per class."""
    # Kept on the class itself, to go with it: every fx.GraphModule has a class of its own.
    if _CLASS not in vars(original):
        setattr(original, _CLASS, _make_class(original))
    return cast("type[Any]", vars(original)[_CLASS])


_CLASS = "_mpgraph_converted_class"


def _make_class(original: type[nn.Module]) -> type[Any]:

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            state = getattr(self, STATE)
            if tracing.is_capture:  # as a part of another converted model
                return state.original_forward()(self, *args, **kwargs)
            return state.region(state, self, args, kwargs)
        # A slice of a converted Sequential has its class, but was never converted itself.
        state = vars(self).get(STATE) or state_of(self)
        return state.call(self, args, kwargs)

    # By the user's name: printed models, errors and saved configs are to say what they said.
    copied = ("__module__", "__qualname__", "__doc__")
    namespace = {"forward": forward, **{name: getattr(original, name) for name in copied}}
    return type(original.__name__, (MixedPrecision, original), namespace)


def state_of(model: Any, precision: str = "bf16") -> State:
    """The conversion state of a converted module; ``precision`` is for the error's advice.

    Raises:
        MPGraphError: The module was not converted.
    """
    state = vars(model).get(STATE) if hasattr(model, "__dict__") else None
    if not isinstance(state, State):
        raise MPGraphError(
            f"expected a module from mpgraph.convert, found {type(model).__name__}. "
            f"Convert it first: model = mpgraph.convert(model, {precision!r})"
        )
    return state


class State:
    """Captures calls, keeps the graphs, and runs the right one."""

    def __init__(self, settings: Settings, original: type[nn.Module], forward: Any = None) -> None:
        self.settings = settings
        self.original = original
        # An instance's own forward (as accelerate sets it) wins over its class's.
        self.instance_forward = forward
        self.weights = WeightCopies()
        self.scale = CurrentScale(LossScale())
        # Is shown every call before it runs, and says what to run: see mpgraph.ranges.
        self.observer: Any = None
        self._reset()

    def belongs_to(self, model: nn.Module) -> None:
        """Be the state of this module, and ready for a graph of torch.compile's."""
        from mpgraph.capture import region

        self.model: Callable[[], nn.Module | None] = weakref.ref(model)
        self.region = region.run_region
        self.settle(model)
        self.rewriter = region.rewriter_of(self)
        self.body = region.body_of(self.original_forward(), self.settings)

    def settle(self, model: nn.Module) -> None:
        """Be on the device where the model is now, the loss scale too, before anything is traced.

        Compiled code that had met a scale on the CPU would wait for the GPU at every step.
        """
        tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
        if tensor is None or tensor.is_meta:
            return
        self.scale.move(tensor.device)
        if tensor.device.type != self.settings.device:
            self.settings = dataclasses.replace(self.settings, device=tensor.device.type)
            self._reset()
            self.belongs_to(model)

    def again(self, settings: Settings) -> State:
        """The state of the same module, converted anew: the loss scale is where it was."""
        new = State(settings, self.original, self.instance_forward)
        new.scale = copy.copy(self.scale)
        return new

    def _reset(self) -> None:
        self._by_key: dict[Any, list[Any]] = {}
        self._tree: ModuleTree | None = None
        self._signature: Signature | None = None
        self._said: set[str] = set()
        self.moves: set[str] = set()
        self.dynamo: Any = None
        # Graphs inside of torch.compile's own: see mpgraph.capture.region.
        self.compiled: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are captured again after copying or loading: they point into one module."""
        keep = ("settings", "original", "instance_forward", "scale")
        return {name: vars(self)[name] for name in keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.weights = WeightCopies()
        self.observer = None
        self._reset()

    def context(self) -> PassContext:
        """What the passes know of this model, in the gradient mode of the moment."""
        settings = self.settings
        return PassContext(
            policy=settings.policy,
            compute=settings.precision.compute,
            device=settings.device,
            grad=torch.is_grad_enabled(),
            strict=settings.policy.preset.startswith("autocast"),
            scaled=settings.scaled,
        )

    def specialisations(self) -> list[Any]:
        """Every graph captured so far, in order of capture; then those of torch.compile."""
        return [*(entry for entries in self._by_key.values() for entry in entries), *self.compiled]

    def original_forward(self) -> Callable[..., Any]:
        """The user's ``forward``, taking the module first."""
        if self.instance_forward is not None:
            return lambda _, *args, **kwargs: self.instance_forward(*args, **kwargs)
        return self.original.forward

    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call: through its graph, or the user's own forward while it is captured."""
        if getattr(local, "capturing", False):
            self.say(
                f"{type(model).__name__} is converted, and is part of another converted model, "
                "whose precision and policy hold for both."
            )
            return self.original_forward()(model, *args, **kwargs)
        if (traced := getattr(local, "step", None)) is not None:
            return traced(self, model, args, kwargs)
        arguments = self.bind(model, args, kwargs)
        leaves, spec = flatten(arguments)
        entry = self.find(model, leaves, spec)
        if self.observer is not None:
            entry = self.observer.see(self, entry, args, kwargs)
        if torch.is_autocast_enabled(self.settings.device):
            self._say_autocast()
            with torch.autocast(self.settings.device, enabled=False):
                return entry.run_call(model, leaves, args, kwargs)
        return entry.run_call(model, leaves, args, kwargs)

    def capture(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Capture the graph for a call without running it."""
        leaves, spec = flatten(self.bind(model, args, kwargs))
        return self.find(model, leaves, spec)

    def bind(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as ``forward`` declares them."""
        if self._signature is None:
            self._signature = Signature(self.original_forward(), type(model).__name__)
        return self._signature.bind(args, kwargs)

    def find(self, model: nn.Module, leaves: list[Any], spec: Spec) -> Any:
        """The graph for a call, captured now if there is none yet."""
        with lock:
            return self._find_or_capture(model, leaves, spec)

    def _find_or_capture(self, model: nn.Module, leaves: list[Any], spec: Spec) -> Any:
        tree = self.tree(model)
        if self._is_carried_by_dynamo(model):
            tree.check_dtypes()  # the key leaves it to Dynamo to see what has changed
        entry = self._captured(model, leaves, spec)
        if entry is not None:
            return entry
        tree.note_tensors()  # some may have been replaced
        entry = self._captured(model, leaves, spec)
        if entry is not None:
            return entry
        entries = self._by_key.get(self._key(model, leaves, spec), [])
        entry = self._capture(model, leaves, spec, entries)
        if entry.engine == "export":
            tree.reads.note(entry.captured.reads)
            self.moves |= entry.captured.moves
        # Anew, because a first call may have set something up, such as hooks.
        key = self._key(model, leaves, spec, guarded=entry.engine == "dynamo")
        self._by_key.setdefault(key, []).append(entry)
        return entry

    def tree(self, model: nn.Module) -> ModuleTree:
        """The modules below the model, as they are now."""
        if self._tree is None or not self._tree.is_current(model):
            self._by_key.clear()
            self.dynamo = None
            self._tree = ModuleTree(model, has_masters=not self.settings.precision.pure)
        if self.dynamo is not None and self.dynamo.hooks != global_hooks():
            self._forget_dynamo()
        return self._tree

    def _forget_dynamo(self) -> None:
        self.dynamo = None
        for key, entries in self._by_key.items():
            self._by_key[key] = [entry for entry in entries if entry.engine != "dynamo"]

    def _captured(self, model: nn.Module, leaves: list[Any], spec: Spec) -> Any:
        entries = self._by_key.get(self._key(model, leaves, spec), [])
        return next((entry for entry in entries if entry.accepts(leaves)), None)

    def _key(
        self, model: nn.Module, leaves: list[Any], spec: Spec, *, guarded: bool = False
    ) -> Any:
        """What calls of one kind have in common; Dynamo guards the attributes that it reads."""
        assert self._tree is not None
        guarded = guarded or self._is_carried_by_dynamo(model)
        return (
            spec,
            tuple([_describe(leaf) for leaf in leaves]),
            same_leaves(leaves),
            self._tree.among(leaves),
            self._tree.training(),
            torch.is_grad_enabled(),
            is_transformed(),
            None if guarded else self._tree.version(),
        )

    def _is_carried_by_dynamo(self, model: nn.Module) -> bool:
        if self.dynamo is None:
            return False
        from mpgraph.capture.dynamo import is_carried

        return is_carried(self, model)

    def _capture(self, model: nn.Module, leaves: list[Any], spec: Spec, entries: list[Any]) -> Any:
        from mpgraph.capture.engines import capture_call
        from mpgraph.capture.saved import (
            hidden_from_dispatch_modes,
            hidden_from_saved_tensors_hooks,
        )

        self._refuse_growth()
        with hidden_from_saved_tensors_hooks(), hidden_from_dispatch_modes():
            return capture_call(self, model, leaves, spec, entries)

    def _refuse_growth(self) -> None:
        count, limit = sum(map(len, self._by_key.values())), self.settings.max_graphs
        if count >= limit:
            raise CaptureError(
                f"this model was captured {times(count)}, for as many kinds of call; the limit is "
                f"{limit}. mpgraph.explain(model) lists them. Pad inputs to fewer shapes, pass "
                "changing numbers as tensors, or raise max_graphs in mpgraph.convert."
            )
        if count == limit // 2:
            self.say(
                f"this model has been captured {times(count)}, for as many kinds of call, and at "
                f"most {limit} are allowed (max_graphs); mpgraph.explain(model) lists them. Every "
                "new kind costs a capture."
            )

    def _say_autocast(self) -> None:
        self.say(
            "a torch.autocast region around a converted model changes nothing inside it; the "
            "model's own precision holds. You can remove the region."
        )

    def say(self, message: str) -> None:
        """Warn once per module."""
        if message not in self._said:
            self._said.add(message)
            warn(message)


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` (``vmap``, ``grad``, ``jvp``) is around the call."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def times(count: int) -> str:
    """``once``, ``twice``, ``3 times``."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _describe(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, torch.Tensor):
        gradient = (leaf.requires_grad, is_trainable_leaf(leaf))
        # Sparse tensors know no contiguity, and some refuse to be asked.
        layout = leaf.is_contiguous() if leaf.layout is torch.strided else leaf.layout
        return type(leaf), leaf.dtype, leaf.dim(), leaf.device, gradient, layout
    return (type(leaf),)
