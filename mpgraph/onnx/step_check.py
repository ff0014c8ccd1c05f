"""One step of an exported folder in onnxruntime, against the same graph in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mpgraph.errors import ExportError
from mpgraph.onnx.self_check import Unavailable
from mpgraph.onnx.step_files import next_name
from mpgraph.onnx.step_trace import StepGraph
from mpgraph.runtime import manifest as files
from mpgraph.runtime.providers import CUDA, Provider

# Of the largest element of a tensor: sums are added up in another order, and in 16 bit a rounding
# that falls the other way moves what follows.
TOLERANCE = 0.05
# How far parameters are moved, of their size, to see what that moves in torch; and how much more
# than that onnxruntime may differ. A tensor whose true value is 0, such as the gradient of a bias
# of keys under a softmax, is rounding noise; an untrained ResNet in fp16 amplifies each rounding.
NUDGE = 2.0**-18
FACTOR = 4.0


def check_step(
    folder: Path,
    graph: StepGraph,
    given: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    pieces: Mapping[str, tuple[int, ...]],
    provider: Provider,
) -> float | None:
    """The largest difference over one step from the state at export.

    Of the tensors that have one to compare: not of those that move as much in torch where the last
    bits of the parameters change. None where the execution provider does not run here.

    Args:
        folder: Where the files are.
        graph: What they were made of.
        given: A value for each of its inputs.
        expected: What torch makes of them.
        pieces: By name, the shapes of state that is updated in pieces.
        provider: The execution provider, with its options.

    Raises:
        ExportError: It is too large: names the output and both values; or onnxruntime cannot run
            the file.
    """
    try:
        session = _session(folder / files.TRAIN, provider)
    except Unavailable:
        return None
    moved: Sequence[torch.Tensor] = ()
    found = _run(session, graph, given, pieces)
    names = [*graph.results, *(next_name(port.name) for port in graph.state())]
    before = dict(zip((next_name(p.name) for p in graph.ports), given, strict=True))
    noisy = _noisy(graph)
    worst = 0.0
    for index, (name, a, b) in enumerate(zip(names, found, expected, strict=True)):
        if name in noisy and _is_within_update(a, b, before[name]):
            continue
        error = difference(a, b)
        if error > TOLERANCE:
            moved = moved or in_torch(graph, _nudged(graph, given))
            if error <= FACTOR * difference(moved[index], b):
                continue
            raise ExportError(
                f"onnxruntime and torch differ in {name} by {error:.2g} of its largest element, "
                f"after one step from the same state: {a.flatten()[:3].tolist()} and "
                f"{b.flatten()[:3].tolist()}. The file is wrong: please report it, with the model."
            )
        worst = max(worst, error)
    return worst


def in_torch(graph: StepGraph, given: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """What the graph returns, computed where it was traced. It writes nothing."""
    places = [n.meta["val"].device for n in graph.graph_module.graph.find_nodes(op="placeholder")]
    placed = [value.to(device) for value, device in zip(given, places, strict=True)]
    with torch.no_grad():
        return [value.cpu() for value in graph.graph_module(*placed)]


def _nudged(graph: StepGraph, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same, but for the last bits of the parameters."""
    generator = torch.Generator().manual_seed(0)
    return [
        value * (1 + NUDGE * torch.randn(value.shape, generator=generator))
        if port.kind == "parameter" and value.dtype is torch.float32
        else value
        for port, value in zip(graph.ports, given, strict=True)
    ]


def reference(
    graph: StepGraph,
    given: Sequence[torch.Tensor],
    first: Sequence[torch.Tensor],
    steps: int = 3,
) -> dict[str, torch.Tensor]:
    """What torch makes of some steps with one batch, to compare with on a device.

    Args:
        graph: The step.
        given: A value for each of its inputs.
        first: What torch makes of them.
        steps: How many there are, that one included.

    Returns:
        ``batch.<name>``; ``loss``, one number per step; and ``norm.<name>`` of each tensor of the
        state afterwards.
    """
    given = [*given]
    places = [i for i, port in enumerate(graph.ports) if port.role == "state"]
    losses = []
    for index in range(steps):
        returned = in_torch(graph, given) if index else first
        losses.append(returned[graph.results.index("loss")].reshape(()))
        for place, value in zip(places, returned[len(graph.results) :], strict=True):
            given[place] = value
    pairs = list(zip(graph.ports, given, strict=True))
    found = {f"batch.{port.name}": v for port, v in pairs if port.role == "batch"}
    norms = {f"norm.{p.name}": v.double().norm() for p, v in pairs if p.role == "state"}
    return {**found, **norms, "loss": torch.stack(losses).double()}


def _noisy(graph: StepGraph) -> frozenset[str]:
    """Parameters of an optimizer that keeps state: Adam's kind divides noise by its own size.

    Where the true gradient is 0 (the bias of a convolution before a batch norm), the update is
    the learning rate times the sign of a rounding error. The state is compared in any case.
    """
    if not any(port.kind == "optimizer" for port in graph.ports):
        return frozenset()
    return frozenset(next_name(p.name) for p in graph.ports if p.kind == "parameter")


def _is_within_update(a: torch.Tensor, b: torch.Tensor, before: torch.Tensor) -> bool:
    size = (b - before).abs().max()
    return bool(((a - b).abs() <= 2 * size).all())


def given_of(
    graph: StepGraph, values: Mapping[str, torch.Tensor], leaves: Sequence[Any]
) -> list[torch.Tensor]:
    """A value for each input of a step: of the batch, and what the others start with."""
    batch = iter(leaves)
    return [
        next(batch).detach().cpu() if port.role == "batch" else values[port.name]
        for port in graph.ports
    ]


def _run(
    session: Any,
    graph: StepGraph,
    given: Sequence[torch.Tensor],
    pieces: Mapping[str, tuple[int, ...]],
) -> list[torch.Tensor]:
    pairs = list(zip(graph.ports, given, strict=True))
    whole = {next_name(port.name): value.shape for port, value in pairs if port.name in pieces}
    feeds = {p.name: v.reshape(pieces.get(p.name, v.shape)).numpy() for p, v in pairs}
    names = [output.name for output in session.get_outputs()]
    found = zip(names, map(torch.from_numpy, session.run(None, feeds)), strict=True)
    return [value.reshape(whole.get(name, value.shape)) for name, value in found]


def _session(file: Path, provider: Provider) -> Any:
    import onnxruntime

    name, _ = provider
    if name == CUDA and not torch.cuda.is_available():
        raise Unavailable(name)  # onnxruntime would say so too, at length, on stderr
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
    except Exception as error:
        raise ExportError(
            f"onnxruntime cannot load {file.name} on {name}: {str(error).strip()}. Nothing was "
            "written. Please report this; verify=False writes the folder nevertheless."
        ) from error
    if name not in session.get_providers():
        raise Unavailable(name)
    return session


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest element; equal infinities are equal."""
    if torch.equal(a, b):
        return 0.0
    if a.is_floating_point() and a.dtype is b.dtype:  # in their dtype, if nothing is infinite
        gap, size = _largest(a - b), _largest(b)
        if gap.isfinite() and size.isfinite():
            return float(gap / size.clamp(min=1e-30))
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    scale = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else torch.tensor(1.0)
    error = torch.where(same, 0.0, (a - b).abs()).max() / scale.clamp(min=1e-30)
    return float(error) if bool(error.isfinite()) else float("inf")


def _largest(value: torch.Tensor) -> torch.Tensor:
    low, high = value.aminmax()
    return torch.maximum(-low, high).double()
