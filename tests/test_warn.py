"""Every warning points at the line of the user's that caused it."""

from __future__ import annotations

import ast
import contextlib
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import mpgraph
from mpgraph import precision
from mpgraph.warn import warn

PACKAGE = Path(mpgraph.__file__).parent


@contextlib.contextmanager
def pointing_here() -> Iterator[None]:
    """Exactly one warning of mpgraph's comes out of the block, and points into it."""
    frame = inspect.currentframe().f_back.f_back
    first = frame.f_lineno
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    (said,) = [w for w in caught if str(w.message).startswith("mpgraph:")]
    assert said.filename == __file__
    assert first < said.lineno <= frame.f_lineno + 1, said


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        return h * 2 if h.sum() > 0 else h


def test_a_notice_about_a_call_points_at_the_call():
    torch._dynamo.reset()
    model = mpgraph.convert(Branch(), "bf16")
    with pointing_here():
        model(torch.ones(2, 8))


def test_through_a_module_of_torch_it_points_at_the_users_call():
    model = nn.Sequential(mpgraph.convert(nn.Linear(8, 4), "bf16"))
    with torch.autocast("cpu"), pointing_here():
        model(torch.ones(2, 8))


def test_a_warning_of_convert_points_at_convert():
    with pointing_here():
        mpgraph.convert(nn.Linear(8, 4).bfloat16(), "bf16", masters="create")


def test_masters_of_a_model_in_fp32_are_nothing_to_warn_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mpgraph.convert(nn.Linear(8, 4), "bf16", masters="create")


def test_a_warning_about_the_machine_points_at_convert(monkeypatch):
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: False)
    with pointing_here():
        mpgraph.convert(nn.Linear(8, 4), "auto")


def test_a_warning_about_a_step_points_at_the_step():
    model = mpgraph.convert(nn.Linear(8, 4), "fp16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 8)).sum().backward()
    with pointing_here():
        optimizer.step()


def test_a_warning_about_a_checkpoint_points_at_its_loading():
    model = mpgraph.convert(nn.Linear(8, 4), "fp16")
    saved = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    optimizer = mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pointing_here():
        optimizer.load_state_dict(saved)


def test_a_prompt_is_the_users_and_a_generated_graph_is_not():
    assert place_of_a_warning_in("<stdin>") == "<stdin>"
    assert place_of_a_warning_in("<eval_with_key>.0") == __file__


def place_of_a_warning_in(filename: str) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile("warn('something')", filename, "exec"), {"warn": warn})
    return caught[0].filename


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_nothing_in_the_package_warns_in_another_way(path):
    if path.name != "warn.py":
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [c.lineno for c in calls if ast.unparse(c.func) == "warnings.warn"]
