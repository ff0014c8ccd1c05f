"""Every test runs with verification around every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

from mpgraph import ir, pipeline
from mpgraph.infer import run_on_values
from mpgraph.onnx.targets import TargetContext
from mpgraph.step.joint import StepContext
from mpgraph.verify import verify

GOLDEN = Path(__file__).parent / "golden"
# Passes up to this one may leave decisions that are not yet true.
_BEFORE_CASTS = ("normalize", "open_composites", "assign_dtypes")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let goldens be written anew: ``pytest --update-golden``."""
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")


def _check(
    gm: fx.GraphModule, graph_pass: pipeline.GraphPass, context: pipeline.PassContext
) -> None:
    if isinstance(context, StepContext):
        gm.graph.lint()
        assert all("part" in n.meta for n in gm.graph.nodes if n.op == "call_function")
        return
    if isinstance(context, TargetContext):
        _check_values(gm)
        return
    is_scaled = graph_pass.name in ("scale_backward", "spread_scale") and context.scaled
    verify(
        gm,
        after=graph_pass.name,
        decided=graph_pass.name not in _BEFORE_CASTS,
        scaled=context.grad if is_scaled and "body" not in gm.meta else None,
    )


def _check_values(gm: fx.GraphModule) -> None:
    """Every value of a functional graph has the dtype that torch gives for the node's inputs."""
    from mpgraph.onnx.whole_operators import whole_operators

    gm.graph.lint()
    with whole_operators:  # graphs of exports may hold CTC, which torch has no fake kernel for
        for node in filter(ir.is_operator, gm.graph.nodes):
            if not node.target._schema.returns:
                continue  # an assertion
            assert _dtypes(run_on_values(node)) == _dtypes(node.meta["val"]), node.format_node()


def _dtypes(value: object) -> list[torch.dtype]:
    return [v.dtype for v in pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]


@pytest.fixture(autouse=True)
def _verification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "checks", [_check])


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with tests/golden/<name>.txt; a missing file is a failure."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text + "\n")
        assert path.exists(), f"no {path.name}; run pytest --update-golden and review the new file"
        assert text + "\n" == path.read_text()

    return check
