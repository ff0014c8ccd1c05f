"""The Hugging Face Trainer, one step at a time, for tools/bench.py."""

from __future__ import annotations

import atexit
import tempfile
import threading
from typing import Any

from torch import Tensor, nn

ENDLESS = 10**9


class Returning(nn.Module):
    """A model as the Trainer takes it: named inputs, and a dict with the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of a model that returns it."""
        return {"loss": self.model(input_ids, labels)}


class TrainerSteps:
    """Each call lets ``Trainer.train()``, which runs in a thread of its own, take one step.

    Args:
        model: Takes a batch and returns its loss.
        batch: Two tensors with a row for every sequence; every step sees it.
        options: For ``TrainingArguments``: ``bf16=True``, ``torch_compile=True``.
    """

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor], **options: Any) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.loss: Any = None
        self._error: BaseException | None = None
        self._stopped = False
        self._folder = tempfile.TemporaryDirectory()
        self._trainer = self._made(Returning(model), [t.cpu() for t in batch], options)
        threading.Thread(target=self._train, daemon=True).start()
        atexit.register(self.stop)

    def __call__(self) -> Any:
        """One step; its loss."""
        self.go.release()
        self.done.acquire()
        if self._error is not None:
            raise self._error
        return self.loss

    def stop(self) -> None:
        """Let the thread end."""
        self._stopped = True
        self.go.release()

    def _train(self) -> None:
        self.go.acquire()
        try:
            self._trainer.train()
        except BaseException as error:
            self._error = error
            self.done.release()

    def _made(self, model: nn.Module, batch: list[Tensor], options: dict[str, Any]) -> Any:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        steps = self

        class Turns(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
                steps.done.release()
                steps.go.acquire()
                control.should_training_stop = steps._stopped
                return control

        class Noting(Trainer):
            def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
                steps.loss = super().training_step(*args, **kwargs)
                return steps.loss

        rows = [{"input_ids": x, "labels": y} for x, y in zip(*batch, strict=True)]
        arguments = TrainingArguments(
            self._folder.name, max_steps=ENDLESS, per_device_train_batch_size=len(rows),
            learning_rate=1e-4, weight_decay=0.01, lr_scheduler_type="constant", max_grad_norm=0.0,
            optim="adamw_torch_fused", logging_strategy="no", save_strategy="no", report_to=[],
            disable_tqdm=True, **options,
        )  # fmt: skip
        return Noting(model, arguments, train_dataset=rows, callbacks=[Turns()])
