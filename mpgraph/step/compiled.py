"""How a step's graph runs: node by node, or compiled."""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._subclasses.fake_tensor import FakeTensorMode

from mpgraph.errors import PrecisionError
from mpgraph.infer import fake_mode_of
from mpgraph.passes.remove_dead import remove_dead
from mpgraph.passes.share_counters import share_counters
from mpgraph.passes.tensor_numbers import tensor_numbers
from mpgraph.passes.widen_sums import widen_sums
from mpgraph.pipeline import GraphPass, run_passes
from mpgraph.step.joint import StepContext, memory_of
from mpgraph.step.partition import SEED, Half, Source, cut
from mpgraph.step.slots import step_slots

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
Run = Callable[..., Sequence[Any]]

COMPILED_PASSES: tuple[GraphPass, ...] = (
    tensor_numbers,
    share_counters,  # after tensor_numbers, which makes counters of what was .item()
    widen_sums,
    remove_dead,
)


@dataclasses.dataclass(frozen=True)
class Backend:
    """How to run a step's graph.

    Attributes:
        inductor: Whether Inductor compiles it; else it runs node by node.
        options: Inductor's configuration.
        replayed: Whether to replay its launches as a CUDA graph.
        fused: Whether optimizers that have a fused kernel use it, instead of an update that
            Inductor generates: that reads 16-bit gradients and saves memory traffic, but takes
            long to compile.
    """

    inductor: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    replayed: bool = False
    fused: bool = True

    @classmethod
    def of(cls, compile: bool | str) -> Backend:
        """What ``TrainStep(compile=...)`` asks for.

        Raises:
            PrecisionError: It is no mode of ``torch.compile``.
        """
        if compile is False:
            return cls(inductor=False, fused=False)
        mode = "default" if compile is True else compile
        if mode not in MODES:
            raise PrecisionError(
                f"compile must be True, False or a mode of torch.compile ({', '.join(MODES)}), "
                f"found {compile!r}"
            )
        tuned = mode.startswith("max-autotune")
        return cls(
            options={"max_autotune": True, "combo_kernels": True} if tuned else {},
            replayed=mode in ("reduce-overhead", "max-autotune"),
            fused=not tuned,
        )

    def compiled(self, gm: fx.GraphModule, context: StepContext, mode: FakeTensorMode) -> Run:
        """Make a graph runnable: it takes one value per input."""
        if not self.inductor:
            run: Run = gm.forward
            return run
        run_passes(gm, COMPILED_PASSES, context)
        static = [i for i, slot in enumerate(step_slots(gm.graph)) if slot.read is not None]
        return Halves(*cut(gm, mode, static), self.options)


class Halves:
    """The forward and the backward half of a step, compiled by Inductor."""

    def __init__(self, forward: Half, backward: Half, options: Mapping[str, Any]) -> None:
        self.forward, self.backward = forward, backward
        with torch.no_grad():
            strides: list[Any] = []
            self._first = _compile(forward, forward.values, options, strides, backward=False)
            values = _restrided(forward, backward, strides)
            given = _given_away(forward, backward)
            _name_given(backward, given)
            self._second = _compile(backward, values, options, [], backward=True, given=given)
        self._seed: torch.Tensor | None = None  # the gradient of the loss
        if SEED in backward.sources:
            like = backward.values[backward.sources.index(SEED)]
            self._seed = torch.ones(like.shape, dtype=like.dtype, device=like.device)
        self._count = 1 + max(i for k, i in (*forward.results, *backward.results) if k == "output")

    def __call__(self, *values: Any) -> Sequence[Any]:
        """One step, with these values of its inputs."""
        found: list[Any] = [None] * self._count
        kept: dict[str, Any] = {}
        returned = self._first([self._argument(s, values, kept) for s in self.forward.sources])
        for (kind, name), value in zip(self.forward.results, returned, strict=True):
            if kind == "output":
                found[name] = value
            else:
                kept[name] = value
        # The compiled code frees what it has been given as soon as it can; nothing else holds it.
        del returned, value
        arguments = [self._argument(source, values, kept) for source in self.backward.sources]
        kept.clear()
        returned = self._second(arguments)
        for (_, place), value in zip(self.backward.results, returned, strict=True):
            found[place] = value
        return found

    def _argument(self, source: Source, values: Sequence[Any], kept: dict[str, Any]) -> Any:
        kind, name = source
        if kind == "input":
            return values[name]
        if kind == "size":
            index, dim = name
            return values[index].shape[dim]
        return kept.pop(name) if kind == "kept" else self._seed


def _compile(
    half: Half,
    values: Sequence[Any],
    options: Mapping[str, Any],
    strides: list[Any],
    *,
    backward: bool,
    given: Sequence[int] = (),
) -> Callable[[list[Any]], Sequence[Any]]:
    """Compile one half; ``strides`` is filled with those of its results.

    It may write its own values to the memory of the ``given`` inputs.
    """
    fixed = [i for i, (kind, _) in enumerate(half.sources) if kind == "input"]
    mode: Any = fake_mode_of(values)
    context = TracingContext(mode)
    metadata: Any = types.SimpleNamespace(bw_donated_idxs=[*given])  # as AOTAutograd says it
    context.fw_metadata = metadata
    context.fakify_first_call = True  # or strides of symbolic sizes come back as numbers
    # What is kept for the backward half may lie as Inductor likes it; results lie as they do.
    visible = [i for i, (kind, _) in enumerate(half.results) if kind == "output"]
    half.graph_module.graph.output_node().meta["user_visible_output_idxs"] = visible
    with (
        mode,
        tracing(context),
        TracingContext.report_output_strides() as reported,
        inductor_config.patch(dict(options)),
        torch._C._DisableAutocast(),
    ):
        compiled: Any = compile_fx_inner(
            half.graph_module, [*values], static_input_idxs=fixed, is_backward=backward
        )
        strides.extend(reported or [])
    return cast("Callable[[list[Any]], Sequence[Any]]", compiled)


def _given_away(forward: Half, backward: Half) -> list[int]:
    """Which inputs of the backward half are kept for it alone, in memory that nothing else has."""
    everything = [*forward.values, *forward.returned, *backward.returned]
    counts = collections.Counter(map(memory_of, everything))
    kept = dict(zip(forward.results, forward.returned, strict=True))
    return [
        index
        for index, source in enumerate(backward.sources)
        if source in kept and counts[memory_of(kept[source])] == 1
    ]


def _name_given(backward: Half, given: Sequence[int]) -> None:
    """Tell halves with other given inputs apart: Inductor's cache knows them by their text."""
    places = list(backward.graph_module.graph.find_nodes(op="placeholder"))
    for index in given:
        places[index].target = f"given_{places[index].target}"
    backward.graph_module.recompile()


def _restrided(forward: Half, backward: Half, strides: list[Any]) -> list[Any]:
    """The values of the backward half's inputs, as the compiled forward half lays them out."""
    laid = dict(zip((name for _, name in forward.results), strides, strict=False))
    values = []
    for (kind, name), value in zip(backward.sources, backward.values, strict=True):
        stride = laid.get(name) if kind == "kept" else None
        if stride is not None and [*map(str, value.stride())] != [*map(str, stride)]:
            with value.fake_mode:
                value = torch.empty_strided(
                    value.shape, [*stride], dtype=value.dtype, device=value.device
                )
        values.append(value)
    return values
