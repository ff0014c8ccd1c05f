"""The graphs of a step, each made when a batch of its kind first comes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mpgraph.errors import CaptureError
from mpgraph.pipeline import PassReport
from mpgraph.step.arguments import trained_by
from mpgraph.step.assemble import assemble, flat_outputs, moving_scales
from mpgraph.step.counters import EqualCounters, Groups
from mpgraph.step.joint import StepContext, gradients_of
from mpgraph.step.kinds import BatchKind, Kinds
from mpgraph.step.optimizer_places import counters_to_device
from mpgraph.step.program import Launch, Program, with_fused_update
from mpgraph.step.refusals import refuse_sparse
from mpgraph.step.settings import StepSettings
from mpgraph.step.slots import step_slots
from mpgraph.step.trace_gradients import Gradients, trace_gradients
from mpgraph.step.trace_update import (
    NewState,
    Update,
    has_fused_kernel,
    trace_fused_update,
    trace_update,
)
from mpgraph.step.window import Window


class ProgramKind(NamedTuple):
    """What one program runs: a kind of batch, and the kind of update that follows."""

    batch: BatchKind
    update: Any
    is_last: bool


class Captures:
    """What has been captured for one step.

    Attributes:
        gradients: The traced loss of each kind of batch.
        programs: What runs.
        counters: Which of the optimizer's counters are equal.
    """

    def __init__(self, settings: StepSettings, kinds: Kinds, window: Window) -> None:
        self._settings, self._kinds, self._window = settings, kinds, window
        self.gradients: dict[BatchKind, Gradients] = {}
        self.programs: dict[ProgramKind, Program] = {}
        self.counters = EqualCounters(settings.optimizer)
        self._updates: dict[ProgramKind, Update | None] = {}
        self._launches: dict[Any, tuple[Any, list[PassReport], Launch]] = {}
        self._is_fused = settings.backend.fused and has_fused_kernel(settings.optimizer)

    def program(self, batch: BatchKind, leaves: list[Any], is_last: bool) -> Program | None:
        """The graph for this batch, made if there is none; None for a first step."""
        kind = ProgramKind(batch, self._update_kind() if is_last else None, is_last)
        found = self.programs.get(kind)
        if found is not None and self._holds(kind):
            return found
        gradients = self.traced(batch, leaves)
        update = self._traced_update(kind, gradients) if is_last else None
        if is_last and update is None:
            return None
        self.programs[kind] = self._made(gradients, update, is_last)
        return self.programs[kind]

    def without_update(self, gradients: Gradients) -> Program:
        """For a first step: the gradients, which the optimizer takes itself."""
        context = self.context(gradients, True)
        gm, reports = assemble(gradients.graph_module, None, context, checked=False)
        names = flat_outputs(gm)
        return Program(
            gradients, gm, reports, None, Launch(gm.forward, step_slots(gm.graph), names)
        )

    def with_all_sums(self, batch: BatchKind, leaves: list[Any]) -> BatchKind:
        """The kind of batch that ends a window, with those sums that it adds nothing to.

        Raises:
            CaptureError: A sum is of a parameter that is not trained any more.
        """
        found = gradients_of(self.traced(batch, leaves).graph_module.graph)
        zeros = self._window.waiting.difference(found)
        if lost := zeros.difference(self._trained()):
            raise CaptureError(
                f"gradients of {', '.join(sorted(lost))} have been added up, and now it is frozen "
                "or gone. Change what is trained after an update, not between the batches of one."
            )
        if not zeros:
            return batch
        batch = batch._replace(zeros=zeros)
        self.traced(batch, leaves)
        return batch

    def traced(self, batch: BatchKind, leaves: list[Any]) -> Gradients:
        """The loss of such a batch and its gradients."""
        if batch not in self.gradients:
            self._say_how_many()
            settings = self._settings
            self.gradients[batch] = trace_gradients(
                settings.model, settings.loss_fn, self._trained(), leaves, batch.spec,
                settings.accumulation_steps, batch.zeros, batch.varying(),
            )  # fmt: skip
            self._kinds.note(self.gradients[batch])
        return self.gradients[batch]

    def _say_how_many(self) -> None:
        state = self._settings.state
        if len(self.gradients) == state.settings.max_graphs // 2:
            state.say(
                f"this step has been captured {len(self.gradients)} times, for as many kinds "
                "of batch. Every new kind costs a capture and its memory: pad batches to "
                "fewer shapes, and pass numbers that change as tensors."
            )

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return dict(trained_by(self._settings.optimizer, self._kinds.names))

    def _update_kind(self) -> Any:
        groups, keys = self._kinds.of_update()
        return groups, keys, self._equal_counters(keys)

    def _equal_counters(self, keys: Any) -> Groups:
        if not self._settings.backend.inductor or self._is_fused:
            return ()
        return self.counters.now(keys, self._kinds.names)

    def _holds(self, kind: ProgramKind) -> bool:
        update = self._updates.get(kind)
        if update is None:
            return True
        now = [slot.read() for slot in update.hyperparameters]  # type: ignore[misc]
        return update.holds(now)

    def _traced_update(self, kind: ProgramKind, gradients: Gradients) -> Update | None:
        settings, names = self._settings, self._kinds.names
        values = {n: g.meta["val"] for n, g in gradients_of(gradients.graph_module.graph).items()}
        refuse_sparse(values)
        if settings.on_gpu and settings.backend.inductor:
            counters_to_device(settings.optimizer)
        update = None
        try:
            if settings.backend.fused:
                update = trace_fused_update(
                    settings.optimizer, names, values, gradients.mode,
                    context=self.context(gradients, True), lr=self._learning_rate(),
                )  # fmt: skip
                self._is_fused = update is not None
            if update is None:
                update = trace_update(settings.optimizer, names, values, gradients.mode)
        except NewState:
            update = None
        self._updates[kind] = update
        return update

    def _learning_rate(self) -> torch.Tensor:
        """How fused kernels take it: from the host, exactly, or from where a replay finds it."""
        if self._settings.replayed:
            return torch.zeros((), device="cuda")
        return torch.zeros((), dtype=torch.float64)

    def _made(self, gradients: Gradients, update: Update | None, is_last: bool) -> Program:
        if update is not None and update.is_fused:
            gm, reports, launch = self._launched(gradients, None, is_last)
            launch = with_fused_update(launch, update)
        else:
            gm, reports, launch = self._launched(gradients, update, is_last)
        return Program(gradients, gm, reports, update, launch, self._settings.replayed)

    def _launched(
        self, gradients: Gradients, update: Update | None, is_last: bool
    ) -> tuple[Any, list[PassReport], Launch]:
        """The graph with its passes done, ready to run; without an update, kept for others."""
        key = (id(gradients), is_last)
        if update is None and key in self._launches:
            return self._launches[key]
        context = self.context(gradients, is_last)
        is_checked = update is not None  # by the graph; otherwise with the fused update
        gm, reports = assemble(gradients.graph_module, update, context, checked=is_checked)
        names = flat_outputs(gm)
        run = self._settings.backend.compiled(gm, context, gradients.mode)
        made = gm, reports, Launch(run, step_slots(gm.graph), names)
        if update is None:
            self._launches[key] = made
        return made

    def context(self, gradients: Gradients, is_last: bool) -> StepContext:
        """What passes over this loss and its update may know."""
        settings = self._settings
        return StepContext(
            **vars(settings.state.context()),
            max_grad_norm=settings.max_grad_norm,
            check_finite=settings.check_finite,
            sums=self._window.slots(gradients),
            is_last=is_last,
            scales=moving_scales(gradients.states),
            equal=self.counters.groups,
            loss_rows=settings.loss_rows,
        )
