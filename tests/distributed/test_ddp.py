"""A converted fp16 model under DistributedDataParallel, on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("ddp_worker.py")


def run(world: int, folder: Path) -> list:
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(folder / f"store{world}"),
             str(folder / f"{world}-{rank}.pt")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])},
        )
        for rank in range(world)
    ]  # fmt: skip
    assert [process.wait(timeout=200) for process in processes] == [0] * world
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_ranks_skip_together_and_stay_identical(tmp_path):
    first, second = run(2, tmp_path)
    assert first[0] == second[0] == [False, False, True, True, False, False]
    assert first[1] == second[1] == 2.0**14  # halved twice
    for one, other in zip(first[3], second[3], strict=True):
        assert torch.equal(one, other)

    (alone,) = run(1, tmp_path)
    assert alone[0] == [False, False, True, False, False, False]
    for got, want in zip(first[2][0], alone[2][0], strict=False):
        torch.testing.assert_close(got, want, rtol=5e-3, atol=1e-5)
