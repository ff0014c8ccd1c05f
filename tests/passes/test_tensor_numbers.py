"""Numbers of an update become tensors; what is computed stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn

import mpgraph
from mpgraph.passes.tensor_numbers import tensor_numbers
from mpgraph.step.assemble import copied
from mpgraph.step.slots import step_slots

from .steps import context, gradients_graph

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.01},
    "AdamW": {"weight_decay": 0.01},
    "RMSprop": {"centered": True},
    "Adadelta": {},
    "NAdam": {},
}


def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


class In16Bit(torch.optim.Optimizer):
    """An update in bf16 of fp32 parameters, as Muon's is; kernels round it once, at their end."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move parameters, in several ways."""
        for group in self.param_groups:
            lr = group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if "half" not in state:
                    state["half"] = p.detach().bfloat16()
                half, g = state["half"], p.grad.bfloat16()
                half.copy_(torch.addmm(half, g @ g.T, half, beta=1 - lr, alpha=lr))
                half.copy_(torch.baddbmm(half[None], (g @ g.T)[None], half[None], beta=lr)[0])
                half.add_(g, alpha=-lr).addcmul_(g, half, value=lr).lerp_(g, lr)
                p.add_(g, alpha=-lr).addcmul_(g, g, value=lr).sub_(g, alpha=lr)


def captured_step(name: str) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    model: nn.Module = nn.Linear(4, 3)
    if name in OPTIMIZERS:
        kind = getattr(torch.optim, name)
        optimizer = kind(model.parameters(), lr=0.01, **OPTIMIZERS[name])
    else:
        model = nn.Linear(4, 3, bias=False)
        optimizer = In16Bit(model.parameters(), lr=0.3)
    step = mpgraph.TrainStep(model, optimizer, loss_fn, precision="fp32", compile=False)
    x = torch.randn(5, 4)
    step(x)
    step(x)
    return step, x


def inputs_of(program: Any, gm: fx.GraphModule, x: torch.Tensor) -> list[Any]:
    """A copy of what is there now; numbers as tensors where the graph wants them so."""
    values = []
    for slot in step_slots(gm.graph):
        value = x if slot.read is None else copy.deepcopy(slot.read())
        is_number = slot.like is not None and not isinstance(value, torch.Tensor)
        values.append(torch.full_like(slot.like, value) if is_number else value)
    return values


@pytest.mark.parametrize("name", [*OPTIMIZERS, "in 16 bit"])
def test_an_update_on_tensors_is_the_update_on_numbers(name: str) -> None:
    step, x = captured_step(name)
    program = next(p for p in step._captures.programs.values() if p.update is not None)
    plain = program.graph_module
    changed = copied(plain)
    assert tensor_numbers(changed.graph, context()) > 0
    changed.recompile()
    assert not [n for n in changed.graph.nodes if isinstance(n.meta.get("val"), torch.SymFloat)]
    before, after = inputs_of(program, plain, x), inputs_of(program, changed, x)
    with torch.no_grad():
        plain(*before)
        changed(*after)
    places = [slot.kind for slot in step_slots(plain.graph)]
    for kind, one, other in zip(places, before, after, strict=True):
        if kind in ("parameter", "state"):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_graph_without_numbers_stays() -> None:
    graph = gradients_graph()
    before = str(graph)
    assert tensor_numbers(graph, context()) == 0
    assert str(graph) == before
