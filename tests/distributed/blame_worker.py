"""One rank of the test of blame under DDP: an overflow of both ranks, and one of rank 1 alone."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mpgraph
from mpgraph.module import state_of


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both."""
        return self.second(torch.tanh(self.first(x)))


def loss_of(y: torch.Tensor) -> torch.Tensor:
    """A loss."""
    return y.square().mean()


def everything(model: nn.Module) -> list[torch.Tensor]:
    """What blame must leave alone."""
    scale = state_of(model).scale.value
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    values = [value.clone() for value in model.state_dict().values()]
    return [*values, *gradients, scale.scale.clone(), scale.growth_tracker.clone()]


def place(report: Any) -> Any:
    """Where, and what to do."""
    found = report.finding
    return None if found is None else (found.kind, found.module, found.overrides)


def main(rank: int, world: int, store: str, out: str) -> None:
    """Blame an overflow that all ranks have, one that rank 1 has, and one while guarding."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = mpgraph.convert(Net(), "fp16")
    parallel = DistributedDataParallel(model)
    optimizer = mpgraph.guard(
        torch.optim.SGD(model.parameters(), lr=0.1), model, blame=True, blame_after=2
    )
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
    loss_of(parallel(x)).backward()
    optimizer.step()
    found, unchanged = [], []
    weight = model.second.weight.detach().clone()
    for case in ("all", "one", "none"):
        with torch.no_grad():
            model.second.weight.copy_(weight)
            if case == "all" or (case == "one" and rank == 1):
                model.second.weight.fill_(6e4)
        before = everything(model)
        # Each rank by itself, and in its own time.
        report = mpgraph.blame(parallel, x, loss_fn=loss_of)
        found.append(place(report))
        after = everything(model)
        unchanged.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    said = guarded(parallel, model, optimizer, x, rank)
    parameters = [p.detach().clone() for p in model.parameters()]
    torch.save([found, unchanged, said, parameters, optimizer.last_step_skipped], out)
    dist.destroy_process_group()


def guarded(parallel: Any, model: Any, optimizer: Any, x: torch.Tensor, rank: int) -> list[str]:
    """Steps that rank 1 overflows in, until the guard says why."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            optimizer.zero_grad()
            given = x * 1e6 if rank == 1 else x
            loss_of(parallel(given)).backward()
            optimizer.step()
    return [str(w.message) for w in caught if "mpgraph" in str(w.message)]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
