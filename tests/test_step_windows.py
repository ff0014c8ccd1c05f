"""TrainStep with several batches to an update."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpgraph import CaptureError
from tests.twins import Net, Twins, batch


class Branched(Net):
    """Has a layer that runs only where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, use: bool = False) -> torch.Tensor:
        """Scores."""
        return super().forward(self.spare(x) if use else x)


def branched(model: nn.Module, x: torch.Tensor, y: torch.Tensor, use: bool) -> torch.Tensor:
    return F.cross_entropy(model(x, use).float(), y)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_parameter_that_only_some_batches_of_a_window_use(precision: str) -> None:
    uses = [False, False, True, False, False, True, True, True, False, False]
    twins = Twins(branched, precision, Branched, size=2)
    twins.agree(len(uses), lambda call: (*batch(call), uses[call - 1]))


def test_a_parameter_that_is_frozen_within_a_window_is_refused() -> None:
    twins = Twins(size=2)
    twins.agree(1)
    twins.step.model.first.weight.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(CaptureError, match=r"gradients of first\.weight have been added up"):
        twins.step(*batch(1))
