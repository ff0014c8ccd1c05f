"""Skip optimizer steps whose gradients are not finite, and move the loss scale."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from mpgraph.errors import PrecisionError
from mpgraph.finding import converted_modules
from mpgraph.finite import find_non_finite, gradients_of
from mpgraph.grad_scaler import refuse_grad_scaler
from mpgraph.loss_scale import CurrentScale, LossScale
from mpgraph.module import state_of
from mpgraph.ranges.skips import OnFloor, SkippedSteps
from mpgraph.snapshot import Snapshot, evaluates_closure_first
from mpgraph.unguarded import shares_parameters
from mpgraph.warn import warn

O = TypeVar("O", bound=Optimizer)  # noqa: E741
_KEY = "mpgraph"
_FLAG = "_step_supports_amp_scaling"


def guard(
    optimizer: O,
    *models: nn.Module,
    scale: LossScale | float | None = None,
    max_grad_norm: float | None = None,
    check_finite: bool = False,
    process_group: Any = None,
    blame: bool = False,
    blame_after: int = 5,
    on_floor: OnFloor = "warn",
) -> O:
    """Make ``optimizer.step()`` skip steps whose gradients are not finite; return the optimizer.

    A skipped step leaves parameters, optimizer state and step counters as they were, and
    ``optimizer.last_step_skipped`` true. After every step the loss scale of each fp16 model moves
    by its rule. Optimizers that take the flag themselves (``fused=True``) skip without the host
    waiting for the device; others wait for one number. The scale travels in
    ``optimizer.state_dict()``. Where ``torch.distributed`` is initialised, a step that overflows on
    one rank is skipped on all; all of them must step.

    Args:
        optimizer: Any ``torch.optim.Optimizer``.
        models: Every converted fp16 model that gradients pass through on the way to the
            optimizer's parameters; or an ordinary model, or a wrapper, with such models in it.
        scale: A :class:`mpgraph.LossScale`, or the first scale as a number; else each model keeps
            its own.
        max_grad_norm: Clip gradients to this norm before the step. As a clipping of your own
            before it, this sees true gradients: nothing need be unscaled.
        check_finite: Check for non-finite gradients without an fp16 model as well.
        process_group: The ranks to agree with; all of them by default.
        blame: When steps are skipped again and again, replay the last call of each model and name
            the value that overflows. Keeps that call's arguments and the gradients of its results
            alive, and waits for the device at every step, with fused optimizers too.
        blame_after: After how many skipped steps in a row to warn, once; the warning names the
            value with ``blame=True``. Without it, steps of fused optimizers are not counted.
        on_floor: "warn", once, or "raise", at a step that is skipped at the floor of the scale.

    Raises:
        PrecisionError: The optimizer and the models do not fit each other; later, with
            ``on_floor="raise"``, when the scale goes no lower.

    Example:
        >>> import mpgraph, torch
        >>> model = mpgraph.convert(torch.nn.Linear(4, 2), "fp16")
        >>> optimizer = mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> model(torch.ones(3, 4)).mean().backward()
        >>> _ = optimizer.step()
        >>> bool(optimizer.last_step_skipped)
        False
    """
    if not isinstance(optimizer, Optimizer):
        raise PrecisionError(
            f"guard takes the optimizer first, then the models: expected a torch.optim.Optimizer, "
            f"found {type(optimizer).__name__}"
        )
    converted = dict.fromkeys(
        inner for model in models for inner in converted_modules(model, "fp16").values()
    )
    guarded = [model for model in converted if state_of(model).settings.scaled]
    _check(optimizer, models, guarded, max_grad_norm, check_finite)
    for model in guarded:
        state_of(model).scale.is_guarded = True
        if scale is not None:
            value = scale if isinstance(scale, LossScale) else LossScale(init_scale=float(scale))
            state_of(model).scale.replace(value)
    skips = SkippedSteps(guarded, blame=blame, after=blame_after, on_floor=on_floor)
    _Guard(optimizer, guarded, max_grad_norm, process_group, skips).install()
    return optimizer


def _check(
    optimizer: Any,
    models: tuple[Any, ...],
    guarded: list[nn.Module],
    max_grad_norm: float | None,
    check_finite: bool,
) -> None:
    if _KEY in vars(optimizer):
        raise PrecisionError(
            "this optimizer is guarded already. Guard it once, with all models: "
            "mpgraph.guard(optimizer, first, second)"
        )
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise PrecisionError(f"max_grad_norm must be positive, found {max_grad_norm}")
    if not guarded and not check_finite:
        raise PrecisionError(
            "there is no fp16 model to guard, and no other precision needs a loss scale. Pass the "
            "converted fp16 models, or check_finite=True to skip non-finite steps all the same."
        )
    if models and not any(shares_parameters(optimizer, model) for model in models):
        names = ", ".join(type(model).__name__ for model in models)
        raise PrecisionError(
            f"the optimizer holds none of the parameters of {names}. Make it from the converted "
            "model's parameters, after mpgraph.convert: "
            "torch.optim.AdamW(model.parameters(), ...)"
        )


def guard_of(optimizer: Optimizer) -> Any:
    """What :func:`guard` has put in the way of an optimizer's step; None if nothing."""
    return vars(optimizer).get(_KEY)


class _Overflow(Exception):
    """Leaves an optimizer's step from inside its closure; carries the closure's result."""


class _Guard:
    """What stands between an optimizer and its step."""

    def __init__(
        self,
        optimizer: Optimizer,
        models: list[nn.Module],
        max_grad_norm: float | None,
        process_group: Any,
        skips: SkippedSteps,
    ) -> None:
        self.optimizer: Any = optimizer
        self.models = models
        self.skips = skips
        self.find = functools.partial(
            find_non_finite, max_norm=max_grad_norm, process_group=process_group
        )
        self.run: Callable[..., Any] = optimizer.step
        self.supports_flag = bool(getattr(optimizer, _FLAG, False))

    def install(self) -> None:
        """Put it in the way of ``optimizer.step``, and the scale into its ``state_dict``."""
        optimizer = self.optimizer
        vars(optimizer)[_KEY] = self
        optimizer.last_step_skipped = False
        # torch.amp.GradScaler calls the step of such an optimizer at once, and is refused at once;
        # of another one, only once gradients that were scaled twice are finite.
        setattr(optimizer, _FLAG, True)

        @functools.wraps(self.run)
        def step(_: Any, closure: Any = None, **options: Any) -> Any:
            refuse_grad_scaler("steps a guarded optimizer")
            return self.step(closure, **options)

        # A method, with a function in it: learning-rate schedulers take it apart.
        optimizer.step = types.MethodType(step, optimizer)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)
        if saved := optimizer.param_groups[0].pop(_KEY, None):
            self._take(saved)

    def scales(self) -> list[CurrentScale]:
        """The models' scales; a model may have been converted again since."""
        scales = [state_of(model).scale for model in self.models]
        for scale in scales:
            scale.is_guarded = True
        return scales

    def step(self, closure: Any = None, **options: Any) -> Any:
        """Step, or do not; then move the scales."""
        self.scales()  # guarded, before anybody looks
        self.optimizer._opt_called = True  # or schedulers warn about a skipped first step
        if closure is not None:
            return self._step_with_closure(closure, **options)
        gradients = gradients_of(self.optimizer)
        if not gradients:
            self.optimizer.last_step_skipped = False
            return self.run(**options)
        found = self.find(gradients)
        if self._takes_flag() and not _makes_momentum(self.optimizer):
            result = self._step_with_flag(found, **options)
        else:
            skipped = self.optimizer.last_step_skipped = bool(found.item())
            result = None if skipped else self.run(**options)
        self._move_scales(found)
        return result

    def _takes_flag(self) -> bool:
        """Whether the optimizer's own kernels skip by ``found_inf``, in every group."""
        groups = self.optimizer.param_groups
        return self.supports_flag and all(group.get("fused", True) for group in groups)

    def _step_with_flag(self, found: torch.Tensor, **options: Any) -> Any:
        """Let the kernel decide, as torch.amp.GradScaler does; gradients need no unscaling."""
        optimizer = self.optimizer
        optimizer.last_step_skipped = found > 0
        optimizer.grad_scale, optimizer.found_inf = None, found
        try:
            return self.run(**options)
        finally:
            del optimizer.grad_scale, optimizer.found_inf

    def _step_with_closure(self, closure: Callable[[], Any], **options: Any) -> Any:
        """Check after each evaluation; put everything back if one of them overflows."""
        optimizer = self.optimizer
        before = None if evaluates_closure_first(optimizer) else Snapshot(optimizer)
        found = torch.zeros(())

        def evaluate() -> Any:
            nonlocal found
            result = closure()
            if gradients := gradients_of(optimizer):
                found = self.find(gradients)
                if found.item():
                    raise _Overflow(result)
            return result

        try:
            result = self.run(evaluate, **options)
        except _Overflow as overflow:
            result = overflow.args[0]
            if before is not None:
                before.restore()
        optimizer.last_step_skipped = bool(found.item())
        self._move_scales(found)
        return result

    def _move_scales(self, found: torch.Tensor) -> None:
        self.skips.note(self.optimizer.last_step_skipped)
        for scale in self.scales():
            scale.update(found)

    def _save(self, _: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        saved = {"scales": [scale.value.state_dict() for scale in self.scales()]}
        if not saved["scales"]:
            return {**state, _KEY: saved}
        # torch drops what else a state holds, but not what a group does: there the scale waits if
        # the optimizer that loads it is guarded only later.
        first, *others = state["param_groups"]
        return {**state, "param_groups": [{**first, _KEY: saved}, *others], _KEY: saved}

    def _load(self, _: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [dict(group) for group in state["param_groups"]]
        in_group = groups[0].pop(_KEY, None) if groups else None
        saved = state.get(_KEY, in_group)
        if saved is not None:
            self._take(saved)
        elif self.models:
            warn(
                "this optimizer state was saved without mpgraph.guard, so it holds no "
                "loss scale. The scale stays as it is."
            )
        return {**state, "param_groups": groups}

    def _take(self, saved: Mapping[str, Any]) -> None:
        scales = self.scales()
        if len(saved["scales"]) != len(scales):
            raise PrecisionError(
                f"the optimizer state holds the loss scales of {len(saved['scales'])} models, and "
                f"the optimizer guards {len(scales)}. Guard it with the same models as when it was "
                "saved."
            )
        for scale, value in zip(scales, saved["scales"], strict=True):
            scale.replace(LossScale.from_state_dict(value, scale.value.scale.device))


def _makes_momentum(optimizer: Any) -> bool:
    """Whether this step makes momentum buffers of a fused SGD.

    It makes them without values, and its kernel leaves them so where it skips. The state of other
    fused optimizers starts with values.
    """
    return isinstance(optimizer, torch.optim.SGD) and any(
        group["momentum"] != 0
        and p.grad is not None
        and optimizer.state.get(p, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        for p in group["params"]
    )
