"""A TrainStep and the loop that it replaces, side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import mpgraph
from mpgraph.step.arguments import parameters_of
from tests.zoo.compare import seed_everything


class Net(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores."""
        return self.last(self.drop(torch.relu(self.first(x))))


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss."""
    return F.cross_entropy(model(x).float(), y)


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same batch for the same index."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(5, 6, generator=generator)
    return x, torch.randint(0, 3, (5,), generator=generator)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Without kernels that compute in another order."""
    return torch.optim.AdamW(parameters, lr=1e-2, foreach=False)


class Twins:
    """A step, and the loop that it replaces, from the same weights.

    Args:
        loss: Takes the model and a batch; what it returns is the loss, or starts with it.
        precision: Of both.
        model: Makes the model.
        make: Makes an optimizer of parameters.
        schedule: Makes a scheduler of an optimizer.
        policy: Of both; by default torch.autocast's.
        norm: What gradients are clipped to.
        size: How many batches make one update.
        compile: As for TrainStep.

    Attributes:
        step: The step.
        loop: The model that the loop trains.
        models: The step's, and the loop's.
        optimizers: The step's, and the loop's.
        calls: How many batches there have been.
        equal_nan: Whether NaN is equal to NaN, where there are some.
    """

    def __init__(
        self,
        loss: Callable[..., Any] = loss_fn,
        precision: str = "bf16",
        model: Callable[[], nn.Module] = Net,
        make: Callable[[Any], torch.optim.Optimizer] = adamw,
        *,
        schedule: Callable[[Any], Any] | None = None,
        policy: str = "autocast-cpu",
        norm: float | None = None,
        size: int = 1,
        compile: bool | str = False,
    ) -> None:
        torch.manual_seed(0)
        first = model()
        second = copy.deepcopy(first)
        self.loss, self.norm, self.size = loss, norm, size
        self.optimizers: Any = make(first.parameters()), make(second.parameters())
        self.step = mpgraph.TrainStep(
            first, self.optimizers[0], loss, precision=precision, policy=policy,
            max_grad_norm=norm, accumulation_steps=size, compile=compile,
        )  # fmt: skip
        self.loop: Any = mpgraph.convert(second, precision, policy=policy)
        self.models: Any = (self.step.model, self.loop)
        self.is_guarded = precision == "fp16"
        if self.is_guarded:
            mpgraph.guard(self.optimizers[1], self.loop, max_grad_norm=norm)
        self.schedulers = [schedule(optimizer) for optimizer in self.optimizers if schedule]
        self.calls, self.equal_nan = 0, False

    def take(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """One batch through both, with the same random numbers; what they returned."""
        self.calls += 1
        results = []
        for run in (self.step, self._in_the_loop):
            seed_everything(self.calls)
            results.append(run(*args, **kwargs))
        if self.calls % self.size == 0:
            for scheduler in self.schedulers:
                scheduler.step()
        return results[0], results[1]

    def _in_the_loop(self, *args: Any, **kwargs: Any) -> Any:
        result = self.loss(self.loop, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        (loss / self.size if self.size > 1 else loss).backward()
        if self.calls % self.size == 0:
            self._update_in_the_loop()
        return pytree.tree_map(torch.Tensor.detach, result)

    def _update_in_the_loop(self) -> None:
        if self.norm and not self.is_guarded:
            nn.utils.clip_grad_norm_(self.loop.parameters(), self.norm)
        self.optimizers[1].step()
        self.loop.zero_grad()

    def agree(self, count: int = 2, given: Callable[[int], tuple[Any, ...]] = batch) -> None:
        """So many batches through both; all that they return and write is equal, to the bit."""
        for _ in range(count):
            assert_same(*self.take(*given(self.calls + 1)), equal_nan=self.equal_nan)
            self.compare()

    def compare(self, **tolerance: float) -> None:
        """All that they have written: parameters, buffers, the optimizers' states."""
        assert_same(*self.states(), equal_nan=self.equal_nan, **tolerance)

    def states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything that a step writes, of both, by name."""
        ours, theirs = map(_written, self.models, self.optimizers)
        return ours, theirs


def _written(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    found = dict(model.state_dict())
    for i, parameter in enumerate(parameters_of(optimizer)):
        state = optimizer.state.get(parameter, {})
        found |= {f"{key} of parameter {i}": value for key, value in state.items()}
    return found


def assert_same(got: Any, want: Any, rtol: float = 0, atol: float = 0, **options: Any) -> None:
    """Tensors, or structures of them, with the same dtypes and, by default, the same bits."""
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, **options)
