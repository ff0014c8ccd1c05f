"""Steps of an exported folder on this device, next to what torch made of them at export."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mpgraph.runtime.errors import FolderError
from mpgraph.runtime.manifest import REFERENCE
from mpgraph.runtime.tensors import read_arrays
from mpgraph.runtime.trainer import OnnxTrainer

# In 16 bit, a rounding that falls the other way moves what follows.
TOLERANCES = {"fp32": 1e-3}
LOOSE = 0.05


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How far a device is from torch.

    Attributes:
        losses: One per step, of this device.
        expected: The same, of torch.
        loss_error: The largest difference, relative to torch's loss.
        state_error: The largest difference between the norms of a tensor of the state, relative to
            torch's norm; ``state`` names the tensor.
        state: Which tensor that is.
        tolerance: What is allowed.
    """

    losses: list[float]
    expected: list[float]
    loss_error: float
    state_error: float
    state: str
    tolerance: float

    @property
    def is_right(self) -> bool:
        """Whether the losses are within the tolerance."""
        return self.loss_error <= self.tolerance


def verify(trainer: OnnxTrainer) -> Verdict:
    """Take the recorded steps; the trainer's state is another one afterwards.

    Raises:
        FolderError: Nothing was recorded: it was exported with ``verify=False``.
    """
    if REFERENCE not in trainer.manifest.files:
        raise FolderError(
            f"{trainer.folder} has no {REFERENCE}: it was exported with verify=False, so there is "
            "nothing to compare with."
        )
    recorded, _ = read_arrays(trainer.folder / REFERENCE)
    batch = {name: recorded[f"batch.{name}"] for name in trainer.inputs}
    expected = [float(value) for value in recorded["loss"]]
    losses = [float(trainer.step(**batch)["loss"]) for _ in expected]
    state = trainer.state_dict()
    errors = {name: _error(_norm(v), float(recorded[f"norm.{name}"])) for name, v in state.items()}
    worst = max(errors, key=lambda name: errors[name], default="")
    return Verdict(
        losses, expected, max(map(_error, losses, expected)), errors.get(worst, 0.0), worst,
        TOLERANCES.get(trainer.manifest.precision, LOOSE),
    )  # fmt: skip


def _norm(value: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(value.astype(np.float64)))


def _error(found: float, expected: float) -> float:
    if not np.isfinite(found):
        return 0.0 if found == expected or np.isnan(found) == np.isnan(expected) else float("inf")
    return abs(found - expected) / (abs(expected) or 1.0)
