"""counter_dropout: random numbers that every runtime draws alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mpgraph.errors import ExportError
from mpgraph.onnx.philox import philox, uniform
from mpgraph.passes.counter_dropout import ROWS, SEED, STEP, counter_dropout
from mpgraph.pipeline import run_passes
from mpgraph.policy import Policy
from mpgraph.step.joint import StepContext
from mpgraph.step.slots import StepSlot

# From the authors' own known-answer tests (Random123, examples/kat_vectors): philox4x32 10.
KNOWN = {
    (0, 0, 0, 0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    (0xFFFFFFFF,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0): (
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("given", KNOWN)
def test_philox_gives_the_numbers_of_its_authors(given: tuple[int, ...]) -> None:
    words = [torch.tensor(word) for word in given]
    assert tuple(map(int, philox(words[:4], words[4:]))) == KNOWN[given]


def test_numbers_are_spread_evenly_and_differ_by_seed_step_and_stream() -> None:
    seed, step = torch.tensor(3), torch.tensor(4)
    drawn = uniform((200, 33), 0, seed, step)
    assert abs(float(drawn.mean()) - 0.5) < 0.01
    assert abs(float(drawn.var()) * 12 - 1) < 0.03
    assert 0 <= float(drawn.min()) <= float(drawn.max()) < 1
    others = [uniform((200, 33), 1, seed, step), uniform((200, 33), 0, step, step)]
    others.append(uniform((200, 33), 0, seed, seed))
    assert all(not torch.equal(drawn, other) for other in others)


def _graph(function: Any) -> fx.GraphModule:
    mode = FakeTensorMode()
    with mode:
        gm = make_fx(function)(torch.empty(4, 6))
    (place,) = gm.graph.find_nodes(op="placeholder")
    place.meta["slot"] = StepSlot("input", "x", index=0)
    for node in gm.graph.nodes:
        node.meta["part"] = "forward"
    output = gm.graph.output_node()
    output.args = ({"results": [output.args[0]]},)
    return gm


def _run(gm: fx.GraphModule) -> int:
    (report,) = run_passes(gm, (counter_dropout,), StepContext(Policy(), None))
    return report.edits


def test_dropout_becomes_a_comparison_and_the_step_is_counted() -> None:
    gm = _graph(lambda x: torch.nn.functional.dropout(x, 0.25))
    assert _run(gm) == 3
    slots = [node.meta["slot"] for node in gm.graph.find_nodes(op="placeholder")]
    values = {SEED.name: torch.tensor(5), STEP.name: torch.tensor(1), "x": torch.ones(4, 6)}
    given = [values[slot.name].clone() for slot in slots]
    (found,) = gm(*given)["results"]
    kept = uniform((4, 6), 0, values[SEED.name], values[STEP.name]) < 0.75
    assert torch.equal(found, kept / 0.75)
    after = dict(zip((slot.name for slot in slots), given, strict=True))
    assert after[STEP.name] == 2
    assert after[SEED.name] == 5


def _drawn(function: Any) -> torch.Tensor:
    gm = _graph(function)
    assert _run(gm) == 3
    values = {SEED.name: torch.tensor(5), STEP.name: torch.tensor(1), "x": torch.ones(4, 6)}
    slots = [node.meta["slot"] for node in gm.graph.find_nodes(op="placeholder")]
    found: torch.Tensor = gm(*[values[slot.name].clone() for slot in slots])["results"][0]
    return found


# Of each distribution, its mean and its variance.
_SIZE = (300, 100)
DISTRIBUTIONS: dict[str, tuple[Any, float, float]] = {
    "exponential": (lambda x: x.new_empty(_SIZE).exponential_(2.0), 0.5, 0.25),
    "normal": (lambda x: torch.normal(3.0, 2.0, _SIZE), 3.0, 4.0),
    "normal of means": (lambda x: torch.normal(x.new_full(_SIZE, 3.0), 2.0), 3.0, 4.0),
    "normal of widths": (lambda x: torch.normal(3.0, x.new_full(_SIZE, 2.0)), 3.0, 4.0),
    "normal of both": (
        lambda x: torch.normal(x.new_full(_SIZE, 3.0), x.new_full(_SIZE, 2.0)), 3.0, 4.0,
    ),
    "randint": (lambda x: torch.randint(10, _SIZE), 4.5, 99 / 12),
    "randint from": (lambda x: torch.randint(-3, 7, _SIZE, dtype=torch.int32), 1.5, 99 / 12),
    "randint_like": (lambda x: torch.randint_like(x.new_empty(_SIZE), 10), 4.5, 99 / 12),
    "randint_like from": (lambda x: torch.randint_like(x.new_empty(_SIZE), -3, 7), 1.5, 99 / 12),
}  # fmt: skip


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_distribution_has_its_mean_and_its_variance(name: str) -> None:
    function, mean, variance = DISTRIBUTIONS[name]
    found, own = _drawn(function), function(torch.ones(4, 6))
    assert (found.dtype, found.shape) == (own.dtype, own.shape)
    error = 5 * (variance / found.numel()) ** 0.5
    assert float(found.double().mean()) == pytest.approx(mean, abs=error)
    assert float(found.double().var()) == pytest.approx(variance, rel=0.1)
    if "randint" in name:
        assert len(found.unique()) == 10


def test_the_logarithm_of_an_exponential_number_is_finite() -> None:
    """As F.gumbel_softmax takes it, also where the uniform number is 0, and in fp16."""
    row = ROWS[torch.ops.aten.exponential_.default]
    drawn = row(lambda shape: torch.tensor([0.0, 1 - 2.0**-24]), torch.empty(2).half())
    assert drawn.log().isfinite().all()


def test_a_permutation_has_every_number_once() -> None:
    found = _drawn(lambda x: torch.randperm(1000))
    assert torch.equal(found.sort().values, torch.arange(1000))
    assert not torch.equal(found, torch.arange(1000))


def test_more_integers_than_numbers_are_drawn_are_refused() -> None:
    with pytest.raises(ExportError, match=r"from 0 to 33554431 are more than the 2\*\*24"):
        _run(_graph(lambda x: torch.randint(1 << 25, (3,))))


def test_a_graph_without_random_numbers_stays_as_it_is() -> None:
    assert _run(_graph(lambda x: x.relu())) == 0


def test_another_distribution_is_refused() -> None:
    with pytest.raises(ExportError, match=r"aten\.multinomial.*draws random numbers in a way"):
        _run(_graph(lambda x: torch.multinomial(x, 2)))
