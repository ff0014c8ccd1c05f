"""The whole training step as one call, captured once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from mpgraph.errors import MPGraphError, PrecisionError
from mpgraph.guarding import guard, guard_of
from mpgraph.loss_scale import LossScale
from mpgraph.module import state_of
from mpgraph.policy import Policy
from mpgraph.specialisation import make_assignment
from mpgraph.step.arguments import check_arguments, converted, parameters_of
from mpgraph.step.captures import Captures
from mpgraph.step.compiled import Backend
from mpgraph.step.first_step import first_step
from mpgraph.step.joint import gradients_of
from mpgraph.step.kinds import Kinds
from mpgraph.step.loss import LossFunction, models_own_loss
from mpgraph.step.refusals import refuse_hooks, refuse_inference_mode, refuse_lost_gradients
from mpgraph.step.report import StepReport
from mpgraph.step.settings import StepSettings
from mpgraph.step.sizes import Sizes
from mpgraph.step.trace_gradients import Gradients, NeedsFixedSizes
from mpgraph.step.window import Window
from mpgraph.structure import Spec, count_leaves, flatten, unflatten

if TYPE_CHECKING:
    from mpgraph.onnx.step_report import ExportedStep


class TrainStep:
    """Forward, backward, finite check, clipping, update and loss scale in one captured graph.

    Calling it with a batch does what this loop does, and writes to the same parameters, buffers
    and optimizer state in place::

        loss = loss_fn(model, *batch)
        loss.backward()
        optimizer.step()            # guarded: see mpgraph.guard
        optimizer.zero_grad()

    The first call of a kind of batch captures it; the very first step of an optimizer that has no
    state yet runs in eager mode, since it is another step than those that follow. Learning rates
    and other numbers in the optimizer's groups are read at every call, so schedulers work as
    always; call them after the step.

    Args:
        model: The model, converted or not. A plain one is converted as by :func:`mpgraph.convert`;
            ``step.model`` is the converted one, which shares its parameters.
        optimizer: Any ``torch.optim.Optimizer`` over parameters of the model whose step needs no
            closure.
        loss_fn: Takes the model and a batch, returns the loss, a tuple that starts with it, or a
            dict or object with ``loss`` in it. By default the model returns its own loss.
        precision: As for :func:`mpgraph.convert`; by default "auto", or what a converted model has.
        policy: As for :func:`mpgraph.convert`, where the model is not converted yet.
        max_grad_norm: Clip gradients to this norm before the update.
        accumulation_steps: Update after so many batches, with the mean of their gradients.
        compile: Whether to compile the graph with Inductor; a string is a mode of
            ``torch.compile``. False runs it node by node.
        scale: In fp16, a :class:`mpgraph.LossScale` or the first scale.
        check_finite: Skip steps with non-finite gradients in other precisions than fp16 as well.
        chunk_loss_head: Compute the last linear layer and its cross-entropy for so many rows
            (tokens) at a time, with their gradients: scores over a large vocabulary are never
            held for all rows. Equal up to the order in which float32 numbers are added.
        dynamic: As for ``torch.compile``: by default, sizes of a batch that change become symbols
            at the second shape, and no further shape is compiled; True makes symbols of all at
            once, False compiles every shape by itself, as replayed steps, those with
            ``chunk_loss_head`` and those that are not compiled always do.

    Attributes:
        model: The converted model, for evaluation, saving and printing.
        optimizer: The optimizer.
        last_step_skipped: Whether the last update was left out because a gradient was not finite.

    Raises:
        PrecisionError: Model and optimizer do not fit each other, or an argument is wrong.
        CaptureError: At the first call: what cannot be captured, where, and what to do.

    Example:
        >>> import mpgraph, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> step = mpgraph.TrainStep(
        ...     model, optimizer, lambda model, x: model(x).float().square().mean(),
        ...     precision="bf16", compile=False,
        ... )
        >>> step(torch.ones(3, 4)) > step(torch.ones(3, 4))
        tensor(True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFunction | None = None,
        *,
        precision: str | torch.dtype | None = None,
        policy: Policy | str | Mapping[str, Any] | os.PathLike[str] = "default",
        max_grad_norm: float | None = None,
        accumulation_steps: int = 1,
        compile: bool | str = True,
        scale: LossScale | float | None = None,
        check_finite: bool = False,
        chunk_loss_head: int | None = None,
        dynamic: bool | None = None,
    ) -> None:
        check_arguments(
            model, optimizer, loss_fn, accumulation_steps, max_grad_norm, chunk_loss_head
        )
        self.model = converted(model, precision, policy)
        self.optimizer = optimizer
        self.loss_fn: LossFunction = loss_fn or models_own_loss
        self.accumulation_steps = accumulation_steps
        state, backend = state_of(self.model), Backend.of(compile)
        self.settings = StepSettings(
            model=self.model,
            optimizer=optimizer,
            loss_fn=self.loss_fn,
            accumulation_steps=accumulation_steps,
            max_grad_norm=max_grad_norm,
            check_finite=check_finite or state.settings.scaled,
            loss_rows=chunk_loss_head,
            backend=backend,
        )
        varies = backend.inductor and not backend.replayed and chunk_loss_head is None
        self._sizes = Sizes(dynamic if varies else False)
        self._guard(scale)
        self.window = Window(accumulation_steps)
        self.last_step_skipped: Any = False
        self._forget()

    def _forget(self) -> None:
        """Have nothing captured."""
        self._kinds = Kinds(self.settings, self._sizes)
        self._captures = Captures(self.settings, self._kinds, self.window)
        self._last_batch: tuple[list[Any], Spec] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are captured again after copying or loading: they read and write one model."""
        return {name: value for name, value in vars(self).items() if name not in _CAPTURED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def _guard(self, scale: LossScale | float | None) -> None:
        """Guard the optimizer: for first steps, for its state_dict, and for loops around it."""
        self.settings.state.scale.is_written = True
        if guard_of(self.optimizer) is not None:
            raise PrecisionError(
                "the optimizer is guarded already, and TrainStep checks and scales by itself. Pass "
                "one that mpgraph.guard has not touched, and scale, max_grad_norm and check_finite "
                "to TrainStep."
            )
        if self.settings.check_finite:
            guard(
                self.optimizer, self.model, scale=scale, max_grad_norm=self.settings.max_grad_norm,
                check_finite=True,
            )  # fmt: skip

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step, or add one batch to it; what the loss function returned, detached."""
        leaves, spec = self._last_batch = flatten((args, kwargs))
        refuse_inference_mode()
        state = self.settings.state
        if torch.is_autocast_enabled(state.settings.device):
            state.say(
                "a torch.autocast region around a TrainStep changes nothing in it; the model's "
                "precision holds, and the loss runs as it is written. You can remove the region."
            )
            with torch.autocast(state.settings.device, enabled=False):
                return self._take(leaves, spec)
        return self._take(leaves, spec)

    def _take(self, leaves: list[Any], spec: Spec) -> Any:
        try:
            return self._call(leaves, spec)
        except NeedsFixedSizes as error:
            if not self._sizes.fix():
                raise
            self.settings.state.say(f"{error} Until then, every size of a batch is a capture.")
            return self._call(leaves, spec)

    def _call(self, leaves: list[Any], spec: Spec) -> Any:
        captures, is_last = self._captures, self.window.ends
        batch, leaves = self._kinds.of_batch(leaves, spec, captures.gradients)
        names = self._kinds.names
        refuse_hooks(self.optimizer, parameters_of(self.optimizer), names)
        refuse_lost_gradients(leaves, names, self.settings.state.say)
        if is_last and self.window.waiting:
            batch = captures.with_all_sums(batch, leaves)
        program = captures.program(batch, leaves, is_last)
        gradients = captures.gradients[batch]
        if program is None:
            first = captures.without_update(gradients)
            outputs = first_step(first, self.settings, names, leaves)
        else:
            outputs = program(leaves)
        found = frozenset(gradients_of(gradients.graph_module.graph))
        self.window.note(found)
        if is_last:
            self._note_step(found, outputs)
        return _result(gradients, outputs["results"])

    def explain(self) -> StepReport:
        """What the last captured step does: forward, backward, check, update, in which dtypes.

        Raises:
            MPGraphError: Nothing has been captured yet.
        """
        done = [p for p in self._captures.programs.values() if p.update is not None]
        if not done:
            raise MPGraphError(
                "no step has been captured yet, so there is nothing to show. Call the step twice: "
                "the first step of a new optimizer makes its state and runs by itself."
            )
        graphs = [(done[-1].graph_module, "")]
        update = done[-1].update
        if update is not None and update.is_fused:
            graphs.append((update.graph_module, "update"))
        return StepReport(graphs)

    def export_onnx(
        self,
        folder: str | os.PathLike[str],
        *,
        example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
        target: str = "cpu",
        opset: int | None = None,
        verify: bool = True,
        dynamic_batch: bool = True,
        inference: bool = True,
        seed: int = 0,
    ) -> ExportedStep:
        """Write the whole step as ONNX files that onnxruntime trains from, without torch.

        The folder holds ``train_step.onnx``, ``evaluate.onnx`` and ``infer.onnx`` in standard
        operators, ``state.safetensors`` (parameters, optimizer state, statistics, loss scale, the
        seed of the random numbers) and ``manifest.json``. :class:`mpgraph.runtime.OnnxTrainer`
        runs it. What the optimizer does not train is kept apart, in ``frozen.safetensors``. The
        step itself stays as it is.

        Args:
            folder: Where to; made if it is not there.
            example_inputs: One batch: positional arguments, or keyword arguments as a dict. By
                default the last batch that the step was called with.
            target: "cpu", "cuda", "portable" or "web": where the files are to run.
            opset: The version of the ONNX operators, from 18 to 23.
            verify: Whether to run one step in onnxruntime and in torch, and compare.
            dynamic_batch: Whether batches of any size are taken: the first dimension of every
                tensor that has as many rows as the first one.
            inference: Whether to write ``evaluate.onnx`` and ``infer.onnx`` too.
            seed: The seed of dropout.

        Raises:
            CaptureError: The step cannot be captured as one graph.
            ExportError: It cannot be written, or onnxruntime computes something else.
        """
        from mpgraph.onnx.step_export import export_step

        if isinstance(example_inputs, Mapping):
            batch = flatten(((), dict(example_inputs)))
        elif example_inputs is not None:
            batch = flatten((tuple(example_inputs), {}))
        elif self._last_batch is not None:
            batch = self._last_batch
        else:
            raise MPGraphError(
                "the step has seen no batch, whose shapes and dtypes an export needs. Call it, or "
                "pass one: step.export_onnx(folder, example_inputs=(x, y))."
            )
        return export_step(
            self, folder, *batch, target=target, opset=opset, verify=verify, dynamic=dynamic_batch,
            seed=seed, inference=inference,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer, loss scale and gradients summed so far: all that a step changes.

        Random number generators are not in it: save ``torch.get_rng_state()`` beside it.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **self.window.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, to the same bits.

        Raises:
            MPGraphError: The state is not a step's.
        """
        if missing := {"model", "optimizer", "batches", "sums"} - state.keys():
            raise MPGraphError(
                f"this is not the state of a TrainStep: {', '.join(sorted(missing))} is missing. "
                "Load a model's state with step.model.load_state_dict, an optimizer's with "
                "step.optimizer.load_state_dict."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.window.load_state_dict(state, self.settings.state.settings.device)

    def _note_step(self, updated: frozenset[str], outputs: dict[str, Any]) -> None:
        """After an update of these parameters."""
        self._captures.counters.note(updated)
        optimizer: Any = self.optimizer
        optimizer._opt_called = True  # or schedulers warn that nothing has stepped yet
        if "found_inf" in outputs:
            optimizer.last_step_skipped = outputs["found_inf"]
        self.last_step_skipped = getattr(optimizer, "last_step_skipped", False)
        self.settings.state.weights.clear()


def _result(gradients: Gradients, values: Sequence[Any]) -> Any:
    """What the loss function returned; and what the model's forward assigns, assigned."""
    count = start = count_leaves(gradients.result)
    for assigned in gradients.assigned:
        size = len(assigned.leaves)
        make_assignment(assigned.module, assigned.assignment, values[start : start + size])
        start += size
    return unflatten(gradients.result, values[:count])


_CAPTURED = frozenset({"_kinds", "_captures", "_last_batch"})  # what _forget makes
