"""One rank of the DDP test: trains a converted fp16 model, writes what it ended up with."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mpgraph
from mpgraph.module import state_of


class Net(nn.Module):
    """Two layers, and one that no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Leave the third layer out."""
        return self.second(torch.tanh(self.first(x)))


def batch(rank: int, step: int) -> torch.Tensor:
    """What one rank sees in one step."""
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))


def main(rank: int, world: int, store: str, out: str) -> None:
    """Six steps; in the third, rank 1 overflows."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = mpgraph.convert(Net(), "fp16")
    parallel: Any = model
    if world > 1:
        parallel = DistributedDataParallel(model, bucket_cap_mb=1, find_unused_parameters=True)
    optimizer = mpgraph.guard(torch.optim.SGD(model.parameters(), lr=0.1), model)
    skipped, gradients = [], []
    for step in range(6):
        optimizer.zero_grad()
        if step == 4 and world > 1:
            with parallel.no_sync():
                loss(parallel, rank, step + 100, world).backward()
        value = loss(parallel, rank, step, world)
        if step == 2 and rank == world - 1:
            value = value * float("inf")
        value.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        if step == 3 and rank == 1:
            model.first.weight.grad[0, 0] = float("nan")  # on one rank only
        optimizer.step()
        skipped.append(bool(optimizer.last_step_skipped))
    scale = state_of(model).scale.value.scale.item()
    parameters = [p.detach() for p in model.parameters()]
    torch.save([skipped, scale, gradients, parameters], out)
    dist.destroy_process_group()


def loss(model: Any, rank: int, step: int, world: int) -> torch.Tensor:
    """The mean over this rank's batch, or over both of them in one process."""
    if world > 1:
        return model(batch(rank, step)).square().mean()
    return model(torch.cat([batch(0, step), batch(1, step)])).square().mean()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
