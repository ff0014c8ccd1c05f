"""What a step was told to do."""

from __future__ import annotations

import dataclasses

from torch import nn
from torch.optim import Optimizer

from mpgraph.module import State, state_of
from mpgraph.step.compiled import Backend
from mpgraph.step.loss import LossFunction


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What :class:`mpgraph.TrainStep` was made with; nothing here changes with a step.

    Attributes:
        model: The converted model.
        optimizer: What updates it.
        loss_fn: Takes the model and a batch.
        accumulation_steps: How many batches make one update.
        max_grad_norm: What gradients are clipped to; None: they are not.
        check_finite: Whether a step with non-finite gradients is skipped.
        loss_rows: How many rows of the loss head are computed at a time; None: all.
        backend: How the graph runs.
    """

    model: nn.Module
    optimizer: Optimizer
    loss_fn: LossFunction
    accumulation_steps: int
    max_grad_norm: float | None
    check_finite: bool
    loss_rows: int | None
    backend: Backend

    @property
    def state(self) -> State:
        """The model's conversion state."""
        return state_of(self.model)

    @property
    def replayed(self) -> bool:
        """Whether launches are replayed as a CUDA graph."""
        return self.backend.replayed and self.on_gpu

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on a CUDA device."""
        return self.state.settings.device == "cuda"
