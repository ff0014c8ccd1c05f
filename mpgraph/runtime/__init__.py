"""Training and prediction on a device, from an exported folder: numpy and onnxruntime, no torch.

>>> from mpgraph.runtime import OnnxTrainer  # doctest: +SKIP
>>> trainer = OnnxTrainer("finetune/")  # doctest: +SKIP
>>> trainer.step(x=x, y=y)["loss"]  # doctest: +SKIP
"""

from __future__ import annotations

from mpgraph.runtime.errors import BatchError, FolderError, RuntimeSupportError
from mpgraph.runtime.trainer import OnnxTrainer, batches_of

__all__ = ["BatchError", "FolderError", "OnnxTrainer", "RuntimeSupportError", "batches_of"]
