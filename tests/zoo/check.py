"""One case from build to verdict."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from . import compare
from .captured import captured, unrewritten
from .compare import Comparison, Reading, Verdict, seed_everything, take_step
from .registry import Call, Case
from .subject import CastCounter, Convert, Facts, facts_of, under_autocast

SEED = 20250
# Between the calls every parameter moves by this much against its gradient's sign, so that a
# graph that holds on to the first call's parameters is found out.
UPDATE = 1e-3

# A verdict's cause begins so where the passes kept every bit of what was captured.
ANOTHER_PATH = "another path when traced"

_REFUSALS = ("CaptureError", "PolicyError", "PrecisionError")
_SEVERITY = (Verdict.BITWISE, Verdict.CLOSE, Verdict.WRONG)

Stage = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The verdict on one case, its cause, and what it took."""

    name: str
    verdict: Verdict
    cause: str = ""
    facts: Facts = dataclasses.field(default_factory=Facts)
    casts: int | None = None
    autocast_casts: int | None = None
    eager_seconds: float | None = None
    first_call_seconds: float | None = None
    worst_relative: float = 0.0
    detail: str = ""

    def as_record(self) -> dict[str, Any]:
        """Return the outcome as JSON-ready data."""
        return dataclasses.asdict(self)


class _EagerFailsError(Exception):
    """Eager torch itself cannot train the case, or not twice the same way."""


@dataclasses.dataclass
class _Run:
    """One model on its way through the calls of a case."""

    case: Case
    module: nn.Module
    device: str = "cpu"
    readings: list[Reading] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def step(self, index: int) -> Reading:
        batch = self.case.batch if index != 1 else self.case.second_batch or self.case.batch
        seed_everything(SEED + 1 + index)
        call = inputs_on(self.device, self.case, batch)
        start = time.perf_counter()
        reading = take_step(self.module, call, self.case.loss, SEED + 100 + index)
        self.seconds.append(time.perf_counter() - start)
        self.readings.append(reading)
        return reading

    def update(self) -> None:
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    gradient = parameter.grad.to_dense()
                    parameter.sub_(gradient.sign(), alpha=UPDATE)

    def both_steps(self) -> list[Reading]:
        self.step(0)
        self.update()
        self.step(1)
        return self.readings

    def casts(self) -> int | None:
        """Count the casts of a step like the first; None if the step fails when watched."""
        try:
            with CastCounter() as counter:
                self.step(0)
        except Exception:
            return None
        return int(counter.count)


def inputs_on(device: str, case: Case, batch: int) -> Call:
    """Return the arguments of one call, on the device."""
    if device == "cpu":
        return case.inputs(batch)
    with torch.device(device):
        made = case.inputs(batch)
    args, kwargs = pytree.tree_map_only(
        torch.Tensor,
        lambda t: (
            t if t.device.type == device else t.detach().to(device).requires_grad_(t.requires_grad)
        ),
        (made.args, dict(made.kwargs)),
    )
    return Call(args, kwargs)


def build(case: Case, device: str = "cpu") -> nn.Module:
    """Build the case's model under the fixed seed, in its mode.

    Parameters that start at zero get small random values: a head of zeros has no gradient to
    hand down, and a bias of zeros hides an addition that rounds otherwise.
    """
    seed_everything(SEED)
    model = case.model().train(case.train)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(std=0.02)
    return model.to(device)


def check_case(
    case: Case,
    convert: Convert,
    precision: str = "bf16",
    stage: Stage = lambda name: None,
    device: str = "cpu",
) -> Outcome:
    """Train a case two steps under eager autocast and two steps converted, and compare."""
    try:
        stage("eager")
        eager = _eager_run(case, precision, device)
    except Exception as failure:
        return Outcome(case.name, Verdict.EAGER_FAILS, _one_line(failure), detail=_trace(failure))
    seconds = min(eager.seconds)
    try:
        stage("convert")
        outcome = _check_converted(case, convert, eager, precision)
    except BaseException as failure:
        # Engines pass control about with exceptions outside Exception; one that escapes is a bug.
        if isinstance(failure, KeyboardInterrupt | SystemExit):
            raise
        names = {base.__name__ for base in type(failure).__mro__}
        verdict = Verdict.REFUSED if names.intersection(_REFUSALS) else Verdict.ERROR
        outcome = Outcome(case.name, verdict, _one_line(failure), detail=_trace(failure))
    return dataclasses.replace(outcome, eager_seconds=round(seconds, 4))


def _eager_run(case: Case, precision: str, device: str) -> _Run:
    runs = [
        _Run(case, under_autocast(build(case, device), precision, device), device) for _ in range(2)
    ]
    first, second = (run.both_steps() for run in runs)
    for reading in first:
        if compare.gradient_count(reading) == 0:
            raise _EagerFailsError("no parameter receives a gradient")
        if not compare.is_finite(reading):
            raise _EagerFailsError("the loss or a gradient is not finite")
    for one, other in zip(first, second, strict=True):
        comparison = compare.compare(one, other)
        if comparison.differences:
            raise _EagerFailsError(f"nondeterministic: {comparison}")
    return runs[0]


def _check_converted(case: Case, convert: Convert, eager: _Run, precision: str) -> Outcome:
    device = eager.device
    source = build(case, device)
    source_class, was_training = type(source), source.training
    converted = convert(source)
    run = _Run(case, converted, device)
    run.both_steps()
    float32: list[Reading] = []

    def in_float32(index: int) -> Reading | None:
        if not float32:
            try:
                float32.extend(_Run(case, build(case, device), device).both_steps())
            except Exception:  # a model may need autocast's casts to run at all
                return None
        return float32[index]

    comparisons = [
        compare.compare(want, got, lambda i=i: in_float32(i))  # type: ignore[misc]
        for i, (want, got) in enumerate(zip(eager.readings, run.readings, strict=True))
    ]
    verdict, cause = _worse_of(comparisons)
    if type(source) is not source_class or source.training is not was_training:
        verdict, cause = Verdict.WRONG, "convert changed the class or mode of the model passed in"
    elif verdict is not Verdict.BITWISE and _follows_the_capture(case, run, precision):
        cause = f"{ANOTHER_PATH}: {cause}"
    if not_shared := compare.unshared(source, converted):
        verdict, cause = Verdict.WRONG, not_shared
    return Outcome(
        case.name,
        verdict,
        cause,
        facts=facts_of(converted),
        casts=run.casts(),
        autocast_casts=eager.casts(),
        first_call_seconds=round(run.seconds[0], 4),
        worst_relative=max(c.worst for c in comparisons),
    )


def _follows_the_capture(case: Case, run: _Run, precision: str) -> bool:
    """Whether what was captured, under autocast, gives the converted model's own bits."""
    by_dynamo = facts_of(run.module).engine == "dynamo"
    step = _compiled_steps if by_dynamo else _captured_steps
    try:
        readings = step(case, run.device, precision)
    except Exception:  # a model that cannot be captured alone
        return False
    pairs = zip(readings, run.readings, strict=True)
    return not any(compare.compare(want, got).differences for want, got in pairs)


def _captured_steps(case: Case, device: str, precision: str) -> list[Reading]:
    with unrewritten(precision, device):
        model = captured(build(case, device), precision, f"autocast-{device}")
        return _Run(case, model, device).both_steps()


def _compiled_steps(case: Case, device: str, precision: str) -> list[Reading]:
    model = build(case, device)
    model.forward = torch.compile(model.forward, backend="eager")
    return _Run(case, under_autocast(model, precision, device), device).both_steps()


def _worse_of(comparisons: list[Comparison]) -> tuple[Verdict, str]:
    first, second = comparisons
    if _SEVERITY.index(second.verdict) > _SEVERITY.index(first.verdict):
        return second.verdict, f"second call: {second}"
    return first.verdict, str(first) if first.differences else ""


def _one_line(failure: BaseException) -> str:
    lines = str(failure).strip().splitlines() or [""]
    own = isinstance(failure, _EagerFailsError)
    return lines[0][:300] if own else f"{type(failure).__name__}: {lines[0]}"[:300]


def _trace(failure: BaseException) -> str:
    return "".join(traceback.format_exception(failure))[-6000:]


def check_candidates(
    name: str,
    candidates: Iterator[Case],
    convert: Convert,
    precision: str,
    stage: Stage,
    device: str = "cpu",
) -> Outcome:
    """Check the first of several ways to build a model that eager torch can train."""
    failures: list[Outcome] = []
    for case in candidates:
        stage("eager")
        outcome = check_case(case, convert, precision, stage, device)
        if outcome.verdict is not Verdict.EAGER_FAILS:
            return dataclasses.replace(outcome, name=name)
        failures.append(outcome)
    if not failures:
        return Outcome(name, Verdict.EAGER_FAILS, "no way to build it")
    causes = "; ".join(dict.fromkeys(f.cause for f in failures))
    return dataclasses.replace(failures[-1], name=name, cause=causes[:600])
