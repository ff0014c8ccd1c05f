"""The whole training step as one call, captured once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from mpgraph.errors import CaptureError, MPGraphError, PrecisionError
from mpgraph.guarding import guard, guard_of
from mpgraph.loss_scale import LossScale
from mpgraph.module import State, state_of
from mpgraph.pipeline import PassReport
from mpgraph.policy import Policy
from mpgraph.specialisation import make_assignment
from mpgraph.step.arguments import (
    check_arguments,
    converted,
    parameter_names,
    parameters_of,
    trained_by,
)
from mpgraph.step.assemble import assemble, flat_outputs, moving_scales
from mpgraph.step.compiled import Backend
from mpgraph.step.counters import EqualCounters
from mpgraph.step.joint import StepContext, gradients_of
from mpgraph.step.loss import LossFunction, models_own_loss
from mpgraph.step.optimizer_places import counters_to_device
from mpgraph.step.program import Launch, Program, laid_out, with_fused_update
from mpgraph.step.reads import LossReads
from mpgraph.step.refusals import (
    refuse_hooks,
    refuse_inference_mode,
    refuse_lost_gradients,
    refuse_sparse,
)
from mpgraph.step.report import StepReport
from mpgraph.step.sizes import Pattern, Sizes, varying
from mpgraph.step.slots import StepSlot, step_slots
from mpgraph.step.trace_gradients import Gradients, trace_gradients
from mpgraph.step.trace_update import (
    NewState,
    Update,
    has_fused_kernel,
    trace_fused_update,
    trace_update,
)
from mpgraph.structure import Spec, count_leaves, flatten, unflatten

if TYPE_CHECKING:
    from mpgraph.onnx.step_export import ExportedStep


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
        self._state: State = state_of(self.model)
        self._backend = Backend.of(compile)
        self._check_finite = check_finite or self._state.settings.scaled
        self._loss_rows = chunk_loss_head
        varies = self._backend.inductor and not self._backend.replayed and chunk_loss_head is None
        self._sizes = Sizes(dynamic if varies else False)
        self._guard(max_grad_norm, scale)
        self._max_grad_norm = max_grad_norm
        self._names = parameter_names(self.model, optimizer)
        self._batches = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._waiting: frozenset[str] = frozenset()  # parameters with a sum, in this window
        self.last_step_skipped: Any = False
        self._forget()

    def _forget(self) -> None:
        """Have nothing captured."""
        self._reads = LossReads(self.loss_fn, self.model)
        self._held: Any = None
        self._versions: dict[Any, int] = {}
        self._version = -1
        self._gradients: dict[Any, Gradients] = {}
        self._updates: dict[Any, Update | None] = {}
        self._programs: dict[Any, Program] = {}
        self._launches: dict[Any, tuple[Any, list[PassReport], Launch]] = {}
        self._counters = EqualCounters(self.optimizer)
        self._last_batch: tuple[list[Any], Spec] | None = None
        self._is_fused = self._backend.fused and has_fused_kernel(self.optimizer)

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are captured again after copying or loading: they read and write one model."""
        return {name: value for name, value in vars(self).items() if name not in _CAPTURED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._names = parameter_names(self.model, self.optimizer)
        self._forget()

    def _guard(self, max_grad_norm: float | None, scale: LossScale | float | None) -> None:
        """Guard the optimizer: for first steps, for its state_dict, and for loops around it."""
        self._state.scale.is_written = True
        if guard_of(self.optimizer) is not None:
            raise PrecisionError(
                "the optimizer is guarded already, and TrainStep checks and scales by itself. Pass "
                "one that mpgraph.guard has not touched, and scale, max_grad_norm and check_finite "
                "to TrainStep."
            )
        if self._check_finite:
            guard(
                self.optimizer, self.model, scale=scale, max_grad_norm=max_grad_norm,
                check_finite=True,
            )  # fmt: skip

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step, or add one batch to it; what the loss function returned, detached."""
        leaves, spec = self._last_batch = flatten((args, kwargs))
        refuse_inference_mode()
        if torch.is_autocast_enabled(self._state.settings.device):
            self._state.say(
                "a torch.autocast region around a TrainStep changes nothing in it; the model's "
                "precision holds, and the loss runs as it is written. You can remove the region."
            )
            with torch.autocast(self._state.settings.device, enabled=False):
                return self._call(leaves, spec)
        return self._call(leaves, spec)

    def _call(self, leaves: list[Any], spec: Spec) -> Any:
        is_last = self._batches + 1 == self.accumulation_steps
        batch, leaves = self._kind(leaves, spec)
        refuse_hooks(self.optimizer, parameters_of(self.optimizer), self._names)
        refuse_lost_gradients(leaves, self._names, self._state.say)
        if is_last and self._waiting:
            batch = self._with_all_sums(batch, leaves)
        program = self._program(batch, leaves, is_last)
        gradients = self._gradients[batch]
        outputs = self._first_step(gradients, leaves) if program is None else program(leaves)
        found = frozenset(gradients_of(gradients.graph_module.graph))
        self._batches = 0 if is_last else self._batches + 1
        self._waiting = frozenset() if is_last else self._waiting | found
        if is_last:
            self._note_step(found, outputs)
        return self._result(gradients, outputs["results"])

    def explain(self) -> StepReport:
        """What the last captured step does: forward, backward, check, update, in which dtypes.

        Raises:
            MPGraphError: Nothing has been captured yet.
        """
        done = [p for p in self._programs.values() if p.update is not None]
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
            "batches": self._batches,
            "sums": dict(self._sums),
            "waiting": sorted(self._waiting),
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
        self._batches = state["batches"]
        self._waiting = frozenset(state.get("waiting", state["sums"] if self._batches else ()))
        device = self._state.settings.device
        self._sums = {name: value.to(device, copy=True) for name, value in state["sums"].items()}

    def _note_step(self, updated: frozenset[str], outputs: dict[str, Any]) -> None:
        """After an update of these parameters."""
        self._counters.note(updated)
        optimizer: Any = self.optimizer
        optimizer._opt_called = True  # or schedulers warn that nothing has stepped yet
        if "found_inf" in outputs:
            optimizer.last_step_skipped = outputs["found_inf"]
        self.last_step_skipped = getattr(optimizer, "last_step_skipped", False)
        self._state.weights.clear()

    def _result(self, gradients: Gradients, values: Sequence[Any]) -> Any:
        count = start = count_leaves(gradients.result)
        for assigned in gradients.assigned:
            size = len(assigned.leaves)
            make_assignment(assigned.module, assigned.assignment, values[start : start + size])
            start += size
        return unflatten(gradients.result, values[:count])

    def _program(self, batch: Any, leaves: list[Any], is_last: bool) -> Program | None:
        """The graph for this batch, made if there is none; None for a first step."""
        key = (batch, self._layout() if is_last else None, is_last)
        found = self._programs.get(key)
        if found is not None and self._holds(key):
            return found
        gradients = self._traced(batch, leaves)
        update = self._traced_update(key, gradients) if is_last else None
        if is_last and update is None:
            return None
        self._programs[key] = self._made(gradients, update, is_last)
        return self._programs[key]

    def _kind(self, leaves: list[Any], spec: Spec) -> tuple[Any, list[Any]]:
        """What batches of one kind have in common; and the batch, laid out as they are."""
        kinds = tuple([(t.dtype, t.dim(), t.device, t.requires_grad) for t in leaves])
        patterns = self._sizes.patterns((spec, kinds), leaves)
        if any(None in pattern for pattern in patterns):
            laid_out = [
                t.contiguous() if None in pattern else t
                for t, pattern in zip(leaves, patterns, strict=True)
            ]
            key = self._key(laid_out, spec, patterns)
            known = self._gradients.get(key)
            if known is None or known.sizes.hold(leaves):
                return key, laid_out
        return self._key(leaves, spec, [tuple(t.shape) for t in leaves]), leaves

    def _key(self, leaves: list[Any], spec: Spec, patterns: Sequence[Pattern]) -> Any:
        tree = self._state.tree(self.model)
        held = self._held_now(tree.parameters())
        hooks = tuple([id(hook) for table in _hook_tables(self.model) for hook in table.values()])
        kinds = [
            (p, None if None in p else t.stride(), t.dtype, t.device, t.requires_grad)
            for t, p in zip(leaves, patterns, strict=True)
        ]
        modes = tree.training(), tree.version()
        return spec, tuple(kinds), *modes, held, hooks, self._reads.state()

    def _held_now(self, in_model: list[int]) -> int:
        """A number that stands for the parameters of model and optimizer as they are now."""
        parameters = [*parameters_of(self.optimizer)]
        hooks = [(i, *h) for i, p in enumerate(parameters) if (h := p._backward_hooks)]
        kinds = [p.dtype for p in parameters], [p.requires_grad for p in parameters]
        now: tuple[list[Any], ...] = (in_model, [*map(id, parameters)], *kinds, hooks)
        if now != self._held:
            self._held, self._names = now, parameter_names(self.model, self.optimizer)
            key = tuple([tuple(part) for part in now])
            self._version = self._versions.setdefault(key, len(self._versions))
        return self._version

    def _layout(self) -> Any:
        """The optimizer's parameters, state and settings, as far as a graph depends on them."""
        groups = [
            (*map(id, group["params"]), *(_setting(v) for k, v in group.items() if k != "params"))
            for group in self.optimizer.param_groups
        ]
        state = self.optimizer.state
        keys = tuple([tuple(state.get(p, ())) for p in parameters_of(self.optimizer)])
        return tuple(groups), keys, self._equal_counters(keys)

    def _equal_counters(self, keys: Any) -> tuple[frozenset[str], ...]:
        if not self._backend.inductor or self._is_fused:
            return ()
        return self._counters.now(keys, self._names)

    def _holds(self, key: Any) -> bool:
        update = self._updates.get(key)
        if update is None:
            return True
        now = [slot.read() for slot in update.hyperparameters]  # type: ignore[misc]
        return update.holds(now)

    def _with_all_sums(self, batch: Any, leaves: list[Any]) -> Any:
        """The kind of batch that ends a window, with those sums that it adds nothing to.

        Raises:
            CaptureError: A sum is of a parameter that is not trained any more.
        """
        found = gradients_of(self._traced(batch, leaves).graph_module.graph)
        zeros = self._waiting.difference(found)
        if lost := zeros.difference(dict(trained_by(self.optimizer, self._names))):
            raise CaptureError(
                f"gradients of {', '.join(sorted(lost))} have been added up, and now it is frozen "
                "or gone. Change what is trained after an update, not between the batches of one."
            )
        if not zeros:
            return batch
        batch = (*batch, zeros)
        self._traced(batch, leaves, zeros)
        return batch

    def _traced(
        self, batch: Any, leaves: list[Any], zeros: frozenset[str] = frozenset()
    ) -> Gradients:
        if batch not in self._gradients:
            if len(self._gradients) == self._state.settings.max_graphs // 2:
                self._state.say(
                    f"this step has been captured {len(self._gradients)} times, for as many kinds "
                    "of batch. Every new kind costs a capture and its memory: pad batches to "
                    "fewer shapes, and pass numbers that change as tensors."
                )
            parameters = dict(trained_by(self.optimizer, self._names))
            self._gradients[batch] = trace_gradients(
                self.model, self.loss_fn, parameters, leaves, batch[0], self.accumulation_steps,
                zeros, [varying(pattern) for pattern, *_ in batch[1]],
            )  # fmt: skip
            self._reads.attributes.note(self._gradients[batch].reads)
        return self._gradients[batch]

    def _traced_update(self, key: Any, gradients: Gradients) -> Update | None:
        values = {n: g.meta["val"] for n, g in gradients_of(gradients.graph_module.graph).items()}
        refuse_sparse(values)
        on_gpu = self._state.settings.device == "cuda"
        if on_gpu and self._backend.inductor:
            counters_to_device(self.optimizer)
        update = None
        try:
            if self._backend.fused:
                update = trace_fused_update(
                    self.optimizer, self._names, values, gradients.mode,
                    context=self._context(gradients, True), lr=self._learning_rate(),
                )  # fmt: skip
                self._is_fused = update is not None
            if update is None:
                update = trace_update(self.optimizer, self._names, values, gradients.mode)
        except NewState:
            update = None
        self._updates[key] = update
        return update

    def _learning_rate(self) -> torch.Tensor:
        """How fused kernels take it: from the host, exactly, or from where a replay finds it."""
        if self._state.settings.device == "cuda" and self._backend.replayed:
            return torch.zeros((), device="cuda")
        return torch.zeros((), dtype=torch.float64)

    def _made(self, gradients: Gradients, update: Update | None, is_last: bool) -> Program:
        if update is not None and update.is_fused:
            gm, reports, launch = self._launched(gradients, None, is_last)
            launch = with_fused_update(launch, update)
        else:
            gm, reports, launch = self._launched(gradients, update, is_last)
        replayed = self._backend.replayed and self._state.settings.device == "cuda"
        return Program(gradients, gm, reports, update, launch, replayed)

    def _launched(
        self, gradients: Gradients, update: Update | None, is_last: bool
    ) -> tuple[Any, list[PassReport], Launch]:
        """The graph with its passes done, ready to run; without an update, kept for others."""
        key = (id(gradients), is_last)
        if update is None and key in self._launches:
            return self._launches[key]
        context = self._context(gradients, is_last)
        is_checked = update is not None  # by the graph; otherwise with the fused update
        gm, reports = assemble(gradients.graph_module, update, context, checked=is_checked)
        names = flat_outputs(gm)
        run = self._backend.compiled(gm, context, gradients.mode)
        made = gm, reports, Launch(run, step_slots(gm.graph), names)
        if update is None:
            self._launches[key] = made
        return made

    def _context(self, gradients: Gradients, is_last: bool) -> StepContext:
        return StepContext(
            **vars(self._state.context()),
            max_grad_norm=self._max_grad_norm,
            check_finite=self._check_finite,
            sums=self._sum_slots(gradients) if self.accumulation_steps > 1 else {},
            is_last=is_last,
            scales=moving_scales(gradients.states),
            equal=self._counters.groups,
            loss_rows=self._loss_rows,
        )

    def _sum_slots(self, gradients: Gradients) -> dict[str, StepSlot]:
        slots = {}
        for name, node in gradients_of(gradients.graph_module.graph).items():
            value = node.meta["val"]
            if name not in self._sums or self._sums[name].shape != value.shape:
                self._sums[name] = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
            slots[name] = StepSlot("sum", f"sum of gradient {name}", self._sum_reader(name))
        return slots

    def _sum_reader(self, name: str) -> Any:
        return lambda: self._sums[name]

    def _first_step(self, gradients: Gradients, leaves: list[Any]) -> dict[str, Any]:
        """A step whose update the optimizer makes itself, and with it its state."""
        context = self._context(gradients, True)
        gm, reports = assemble(gradients.graph_module, None, context, checked=False)
        names = flat_outputs(gm)
        launch = Launch(gm.forward, step_slots(gm.graph), names)
        for state in gradients.states:
            state.scale.read()  # a forward pass of its own: the scale moves on from where it is
        outputs = Program(gradients, gm, reports, None, launch)(leaves)
        parameters = {self._names[id(p)]: p for p in parameters_of(self.optimizer)}
        before = {name: p.grad for name, p in parameters.items()}
        try:
            for name, parameter in parameters.items():
                gradient = outputs.get(name)
                if gradient is not None:
                    gradient = laid_out(gradient, parameter.stride())
                parameter.grad = gradient
            if self._max_grad_norm is not None and not self._check_finite:
                nn.utils.clip_grad_norm_(parameters.values(), self._max_grad_norm)
            self.optimizer.step()
        finally:
            for name, parameter in parameters.items():
                parameter.grad = before[name]
        return outputs


# What _forget makes.
_CAPTURED = frozenset(
    {
        "_reads", "_held", "_version", "_versions", "_names", "_gradients", "_updates",
        "_programs", "_launches", "_counters", "_last_batch",
    }
)  # fmt: skip
_ROOT_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hook_tables(model: nn.Module) -> list[dict[int, Any]]:
    """The model's own hooks: those of its parts belong to the version of its tree."""
    return [vars(model)[name] for name in _ROOT_HOOKS]


def _setting(value: Any) -> Any:
    """What a graph depends on, of a setting in a parameter group: of numbers, the type alone."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_setting, value))
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device
    return (type(value), None if isinstance(value, float) else _plain(value))


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, str, type(None))) else id(value)
