"""A converted fp16 model under DistributedDataParallel, on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def run(world: int, folder: Path, worker: str = "ddp_worker.py") -> list:
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / worker), str(rank), str(world),
             str(folder / f"store{world}"), str(folder / f"{world}-{rank}.pt")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
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


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_every_rank_blames_the_same_place_and_changes_nothing(tmp_path):
    first, second = run(2, tmp_path, "blame_worker.py")
    everywhere, alone, nowhere = second[0]
    assert everywhere[:2] == alone[:2] == ("forward", "second")
    assert "module=second run=fp32" in everywhere[2]
    assert nowhere is None
    # Where rank 1 alone overflows, rank 0 has nothing to blame, and does not wait for it.
    assert first[0] == [everywhere, None, None]
    assert first[1] == second[1] == [True, True, True]
    assert [first[4], second[4]] == [True, True]  # the last step was skipped
    assert "of first left the range of fp16" in " ".join(second[2])
    assert "an earlier one, or another rank, is not" in " ".join(first[2])
    for one, other in zip(first[3], second[3], strict=True):
        assert torch.equal(one, other)
