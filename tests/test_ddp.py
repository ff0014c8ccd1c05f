"""DistributedDataParallel around a converted model: two processes, gloo, on the CPU."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mpgraph
from mpgraph import PrecisionError
from mpgraph.module import state_of

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)
WORLD = 2
ORDERS = ("compile, then wrap", "wrap, then compile")


class Net(nn.Module):
    """One layer is left out unless it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.spare = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor, use_spare: bool = False) -> torch.Tensor:
        h = self.b(self.a(x).relu())
        return self.spare(h) if use_spare else h


def converted(capture: str) -> nn.Module:
    torch.manual_seed(0)
    return mpgraph.convert(Net(), "bf16", policy="autocast-cpu", capture=capture)


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * rank + step))


def backward(model: nn.Module, rank: int, step: int, use_spare: bool) -> None:
    model(batch(rank, step), use_spare).float().square().mean().backward()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def alone(capture: str, rank: int, step: int, use_spare: bool) -> dict[str, torch.Tensor]:
    model = converted(capture)
    backward(model, rank, step, use_spare)
    return gradients(model)


def mean_of(capture: str, step: int, use_spare: bool) -> dict[str, torch.Tensor]:
    each = [alone(capture, rank, step, use_spare) for rank in range(WORLD)]
    return {name: sum(g[name] / WORLD for g in each) for name in each[0]}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def check(rank: int, capture: str, find_unused: bool) -> None:
    use_spare = not find_unused
    model = converted(capture)
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    backward(wrapped, rank, 0, use_spare)
    assert_same(gradients(model), mean_of(capture, 0, use_spare))

    wrapped.zero_grad()
    with wrapped.no_sync():
        backward(wrapped, rank, 0, use_spare)
    assert_same(gradients(model), alone(capture, rank, 0, use_spare))
    backward(wrapped, rank, 1, use_spare)
    first, second = mean_of(capture, 0, use_spare), mean_of(capture, 1, use_spare)
    assert_same(gradients(model), {name: first[name] + second[name] for name in first})


def check_compiled(rank: int, order: str) -> None:
    model = converted("export")

    def compiled(inner: nn.Module) -> nn.Module:
        return torch.compile(inner, backend="aot_eager")

    if order == "compile, then wrap":
        wrapped = DistributedDataParallel(compiled(model))
    else:
        wrapped = compiled(DistributedDataParallel(model))
    for step in range(2):
        wrapped.zero_grad()
        backward(wrapped, rank, step, True)
        assert_same(gradients(model), mean_of("export", step, True))
    assert state_of(model).compiled


def work(rank: int, port: int, what: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        if what in ORDERS:
            check_compiled(rank, what)
            return
        for find_unused in (False, True):
            check(rank, what, find_unused)
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow  # two fresh processes import torch
@pytest.mark.parametrize("capture", ["export", "dynamo"])
def test_gradients_are_the_mean_of_what_each_process_computes_alone(capture):
    torch.multiprocessing.spawn(work, (free_port(), capture), nprocs=WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_compiled_gradients_are_the_mean_too(order):
    torch.multiprocessing.spawn(work, (free_port(), order), nprocs=WORLD)


def test_a_wrapped_model_is_refused_with_the_right_order(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(Net())
        with pytest.raises(PrecisionError, match=r"DistributedDataParallel\(mpgraph\.convert"):
            mpgraph.convert(wrapped, "bf16")
        with pytest.raises(PrecisionError, match="DistributedDataParallel at '0'"):
            mpgraph.convert(nn.Sequential(wrapped), "bf16")
    finally:
        dist.destroy_process_group()
