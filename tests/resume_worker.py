"""A part of a training run, in a process of its own: [state file] first last new-state-file."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

import mpgraph

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
}
SPOILED = {3, 8}
RULE = mpgraph.LossScale(init_scale=2.0**10, growth_interval=2)


def main(name: str, order: str, source: str, first: str, last: str, target: str) -> None:
    """Train from step ``first`` to ``last``, and save everything."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))
    model = mpgraph.convert(model, "fp16")
    optimizer = OPTIMIZERS[name](model.parameters())
    if order == "guard":
        mpgraph.guard(optimizer, model, scale=RULE)
    if source != "-":
        weights, state = torch.load(source, weights_only=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    if order == "load":
        mpgraph.guard(optimizer, model, scale=RULE)
    for step in range(int(first), int(last)):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        (loss * float("inf") if step in SPOILED else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save([model.state_dict(), optimizer.state_dict()], target)


if __name__ == "__main__":
    main(*sys.argv[1:])
