"""What the graphs of a step depend on: two batches of one kind run the same graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from mpgraph.plain import HOOKS
from mpgraph.step.arguments import parameter_names, parameters_of
from mpgraph.step.reads import LossReads
from mpgraph.step.settings import StepSettings
from mpgraph.step.sizes import Pattern, Sizes, varying
from mpgraph.step.trace_gradients import Gradients
from mpgraph.structure import Spec


class BatchKind(NamedTuple):
    """What batches have in common whose gradients one graph computes.

    Attributes:
        spec: How their tensors become arguments.
        leaves: For each tensor: its sizes, strides, dtype, device, and whether it wants a gradient.
        around: The model's mode and version, its hooks, what is trained, what the loss reads.
        zeros: At the end of a window, the parameters whose sums such a batch adds nothing to.
    """

    spec: Spec
    leaves: tuple[tuple[Any, ...], ...]
    around: tuple[Any, ...]
    zeros: frozenset[str] = frozenset()

    def varying(self) -> list[frozenset[int]]:
        """For each tensor, the dimensions whose size varies."""
        return [varying(pattern) for pattern, *_ in self.leaves]


class Kinds:
    """Says of which kind batches and updates are, as things are at the moment.

    Attributes:
        names: By identity, the name of each of the optimizer's parameters, as of the last batch.
    """

    def __init__(self, settings: StepSettings, sizes: Sizes) -> None:
        self._settings, self._sizes = settings, sizes
        self._reads = LossReads(settings.loss_fn, settings.model)
        self._held: Any = None
        self._versions: dict[Any, int] = {}
        self._version = -1
        self._name()

    def _name(self) -> None:
        self.names = parameter_names(self._settings.model, self._settings.optimizer)

    def of_batch(
        self, leaves: list[Any], spec: Spec, known: Mapping[BatchKind, Gradients]
    ) -> tuple[BatchKind, list[Any]]:
        """The kind of a batch; and its tensors, laid out as those of this kind are.

        Args:
            leaves: The tensors of the batch.
            spec: How they become ``(args, kwargs)``.
            known: What has been captured, which may hold for a part of the symbolic sizes alone.
        """
        kinds = tuple([(t.dtype, t.dim(), t.device, t.requires_grad) for t in leaves])
        patterns = self._sizes.patterns((spec, kinds), leaves)
        if any(None in pattern for pattern in patterns):
            laid_out = [
                t.contiguous() if None in pattern else t
                for t, pattern in zip(leaves, patterns, strict=True)
            ]
            kind = self._kind(laid_out, spec, patterns)
            found = known.get(kind)
            if found is None or found.sizes.hold(leaves):
                return kind, laid_out
        return self._kind(leaves, spec, [tuple(t.shape) for t in leaves]), leaves

    def _kind(self, leaves: list[Any], spec: Spec, patterns: Sequence[Pattern]) -> BatchKind:
        kinds = [
            (p, None if None in p else t.stride(), t.dtype, t.device, t.requires_grad)
            for t, p in zip(leaves, patterns, strict=True)
        ]
        return BatchKind(spec, tuple(kinds), self._around())

    def _around(self) -> tuple[Any, ...]:
        state, model = self._settings.state, self._settings.model
        tree = state.tree(model)
        held = self._held_now(tree.parameters())
        hooks = tuple([id(hook) for table in _hook_tables(model) for hook in table.values()])
        return tree.training(), tree.version(), held, hooks, self._reads.state()

    def note(self, gradients: Gradients) -> None:
        """The loss has just been traced, for a batch of the kind that things are in now."""
        self._reads.attributes.note(gradients.reads)
        self._reads.taken.note(gradients.taken)

    def _held_now(self, in_model: list[int]) -> int:
        """A number that stands for the parameters of model and optimizer as they are now."""
        parameters = [*parameters_of(self._settings.optimizer)]
        hooks = [(i, *h) for i, p in enumerate(parameters) if (h := p._backward_hooks)]
        kinds = [p.dtype for p in parameters], [p.requires_grad for p in parameters]
        now: tuple[list[Any], ...] = (in_model, [*map(id, parameters)], *kinds, hooks)
        if now != self._held:
            self._name()  # before it is noted: this may refuse
            self._held = now
            key = tuple([tuple(part) for part in now])
            self._version = self._versions.setdefault(key, len(self._versions))
        return self._version

    def of_update(self) -> tuple[Any, Any]:
        """The optimizer's parameters and settings, and its state, as far as graphs depend on it."""
        optimizer = self._settings.optimizer
        groups = [
            (*map(id, group["params"]), *(_setting(v) for k, v in group.items() if k != "params"))
            for group in optimizer.param_groups
        ]
        keys = tuple([tuple(optimizer.state.get(p, ())) for p in parameters_of(optimizer)])
        return tuple(groups), keys


def _hook_tables(model: nn.Module) -> list[dict[int, Any]]:
    """The model's own hooks: those of its parts belong to the version of its tree."""
    return [vars(model)[name] for name in HOOKS]


def _setting(value: Any) -> Any:
    """What a graph depends on, of a setting in a parameter group: of numbers, the type alone."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_setting, value))
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device
    return (type(value), None if isinstance(value, float) else _plain(value))


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, str, type(None))) else id(value)
