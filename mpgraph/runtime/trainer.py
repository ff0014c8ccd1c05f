"""Trains, evaluates and predicts from an exported folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mpgraph.runtime.batch import Arrays, checked
from mpgraph.runtime.buffers import Buffers
from mpgraph.runtime.errors import BatchError, FolderError
from mpgraph.runtime.manifest import (
    EVALUATE,
    FROZEN,
    INFER,
    STATE,
    TRAIN,
    check_files,
    read_manifest,
)
from mpgraph.runtime.progress import shown
from mpgraph.runtime.providers import device_of, providers_of
from mpgraph.runtime.sessions import check_rounding, make_session
from mpgraph.runtime.tensors import read_arrays, write_arrays

Batch = Mapping[str, Any]
Callback = Callable[["OnnxTrainer", dict[str, Any]], Any]


class OnnxTrainer:
    """The training step of an exported folder, run by onnxruntime.

    Its state (parameters, optimizer state, statistics, loss scale, random numbers) lies in
    onnxruntime's own memory; a step reads it there and writes it there.

    Args:
        folder: What ``step.export_onnx(folder)`` has written.
        providers: onnxruntime's execution providers; by default those that it was exported for.
        threads: How many threads a step may use; by default onnxruntime decides.
        in_place: Whether state is written over where the graph proves that safe; otherwise each
            tensor has two buffers, in turn.
        verify: Whether to compare the files with their checksums, and to try whether this
            onnxruntime rounds to 16 bit as the step needs.

    Attributes:
        manifest: What the folder holds.
        steps: How many batches this trainer has seen, since the state was exported.

    Raises:
        FolderError: The folder is none, damaged, or of another version.
        RuntimeSupportError: This onnxruntime cannot run it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        providers: Sequence[Any] | None = None,
        threads: int | None = None,
        in_place: bool = True,
        verify: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._providers = providers_of(self.manifest, providers)
        self._threads = threads
        self._device = device_of(self._providers)
        if verify:
            check_files(self.folder, self.manifest)
        if verify or self._device != "cpu":  # a session shows whether the device is there
            check_rounding(self.folder, self.manifest, self._providers)
        values, _ = read_arrays(self.folder / STATE)
        self._buffers = Buffers(self.manifest.state, values, self._device, in_place)
        self._frozen = self._read_frozen()
        self._numbers = {n.name: n.value for n in self.manifest.numbers}
        self._sessions: dict[str, Any] = {}
        self._bindings: list[Any] = []
        self.steps = 0

    def step(self, **batch: Any) -> dict[str, Any]:
        """Take one step with a batch; its loss and whatever else the step returns.

        Args:
            **batch: An array for each name in ``trainer.inputs``.

        Returns:
            "loss"; "skipped", whether the update was left out because a gradient was not finite;
            "scale", the loss scale of the next step, where there is one; "grad_norm" where
            gradients are clipped; and the other results of the loss function.

        Raises:
            BatchError: A name, dtype or shape is wrong.
        """
        graph = self.manifest.graphs[TRAIN]
        binding = self._binding()
        self._bind(binding, checked(batch, graph.inputs))
        for name, number in self._numbers.items():
            self._bind_number(binding, name, number)
        for tensor in graph.outputs:
            binding.bind_output(tensor.name, "cpu")
        self._session(TRAIN).run_with_iobinding(binding)
        self._buffers.swap()
        self.steps += 1
        names = [tensor.name for tensor in graph.outputs]
        values = binding.get_outputs()[-len(names) :]
        return self._result(dict(zip(names, values, strict=True)))

    def fit(
        self,
        batches: Iterable[Batch] | Callable[[], Iterable[Batch]],
        epochs: int = 1,
        *,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> list[dict[str, Any]]:
        """Train on all batches, so many times.

        Args:
            batches: Dicts of arrays; a list, or a function that gives them anew for each epoch.
            epochs: How many times.
            callbacks: Called after each step with the trainer and what the step returned, "epoch"
                and "step" added. One that returns True ends the training.
            progress: Whether to show a progress bar.

        Returns:
            What each step returned, arrays left out.
        """
        history: list[dict[str, Any]] = []
        for epoch in range(epochs):
            given = batches() if callable(batches) else batches
            for batch in shown(given, f"epoch {epoch + 1}/{epochs}", history, progress):
                result = {**self.step(**batch), "epoch": epoch, "step": self.steps}
                history.append({k: v for k, v in result.items() if not isinstance(v, np.ndarray)})
                if any([callback(self, result) is True for callback in callbacks]):
                    return history
            if not history:
                raise BatchError("there are no batches. A generator can be used once: pass a list.")
        return history

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The mean of each scalar over all batches, weighted by their sizes: "loss" first.

        The model is in evaluation mode: no dropout, running statistics.
        """
        totals: dict[str, float] = {}
        count = 0
        for batch in batches:
            size = max((len(v) for v in batch.values() if np.ndim(v)), default=1)
            for name, value in self._run(EVALUATE, batch).items():
                if np.ndim(value) == 0:
                    totals[name] = totals.get(name, 0.0) + size * float(value)
            count += size
        return {name: total / count for name, total in totals.items()}

    def predict(self, **inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
        """What the model, in evaluation mode, returns for these inputs."""
        return self._run(INFER, inputs)

    @property
    def inputs(self) -> list[str]:
        """The names of what a batch holds."""
        return [tensor.name for tensor in self.manifest.graphs[TRAIN].inputs]

    @property
    def numbers(self) -> dict[str, float]:
        """Hyperparameters by name; a copy."""
        return dict(self._numbers)

    def set_number(self, name: str, value: float) -> None:
        """Set a hyperparameter from the next step on.

        Raises:
            BatchError: The step has no such number, or it was fixed when it was exported.
        """
        if name not in self._numbers:
            raise BatchError(
                f"the step has no number {name!r} that can be set; it has "
                f"{', '.join(self._numbers) or 'none'}. Others were fixed when it was exported."
            )
        self._numbers[name] = float(value)

    @property
    def lr(self) -> float:
        """The learning rate; of the first parameter group, if there are several."""
        return self._numbers[self._rates()[0]]

    @lr.setter
    def lr(self, value: float) -> None:
        for name in self._rates():
            self.set_number(name, value)

    def state_dict(self) -> Arrays:
        """A copy of the state: arrays by name."""
        return self._buffers.values()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint: one file, complete or not there."""
        metadata = {
            "mpgraph": json.dumps({"steps": self.steps, "numbers": self._numbers}),
            "step": self.manifest.files[TRAIN],
        }
        write_arrays(Path(path), self.state_dict(), metadata)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on where a checkpoint was written, to the same bits.

        Raises:
            FolderError: The file is no checkpoint, or one of another step.
        """
        arrays, metadata = read_arrays(Path(path))
        if "mpgraph" not in metadata:
            raise FolderError(f"{path} is no checkpoint of an OnnxTrainer.")
        if metadata.get("step") != self.manifest.files[TRAIN]:
            raise FolderError(
                f"{path} was saved from another step than {self.folder / TRAIN}. Load it with the "
                "folder that it was trained from."
            )
        told = json.loads(metadata["mpgraph"])
        self._buffers.put(arrays)
        self._numbers.update(told["numbers"])
        self.steps = told["steps"]

    def _rates(self) -> list[str]:
        found = [name for name in self._numbers if name.partition(".")[0] == "lr"]
        if not found:
            raise BatchError("the step has no learning rate that can be set.")
        return sorted(found)

    def _read_frozen(self) -> dict[str, Any]:
        if FROZEN not in self.manifest.files:
            return {}
        arrays, _ = read_arrays(self.folder / FROZEN)
        make = ort.OrtValue.ortvalue_from_numpy
        return {name: make(value, self._device, 0) for name, value in arrays.items()}

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            if name not in self.manifest.graphs:
                raise FolderError(f"{self.folder} has no {name}. Export the step again.")
            path = self.folder / name
            self._sessions[name] = make_session(path, self._providers, self._threads)
        return self._sessions[name]

    def _binding(self) -> Any:
        """What this turn reads and writes, state and frozen tensors bound once and for all."""
        if not self._bindings:
            for turn in (0, 1):
                binding = self._session(TRAIN).io_binding()
                self._buffers.bind(binding, turn)
                for tensor in self.manifest.frozen:
                    if tensor.name in self.manifest.graphs[TRAIN].reads:
                        binding.bind_ortvalue_input(tensor.name, self._frozen[tensor.name])
                self._bindings.append(binding)
        binding = self._bindings[self._buffers.turn]
        if self._device != "cpu":
            # What of a device's memory the CPU's kernels read is copied when it is bound.
            self._buffers.bind(binding, self._buffers.turn)
        return binding

    def _bind(self, binding: Any, arrays: Arrays) -> None:
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)

    def _bind_number(self, binding: Any, name: str, value: float) -> None:
        dtype = next(n.dtype for n in self.manifest.numbers if n.name == name)
        binding.bind_cpu_input(name, np.array(value, dtype=dtype))

    def _result(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: _plain(value.numpy()) for name, value in values.items()}
        found["skipped"] = bool(found.get("skipped", False))
        scales = [t.name for t in self.manifest.state if t.name.endswith(".scale")]
        if scales:
            found["scale"] = float(self._buffers.now(scales[0]).numpy())
        return found

    def _run(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        session = self._session(name)
        graph = self.manifest.graphs[name]
        binding = session.io_binding()
        self._bind(binding, checked(given, graph.inputs))
        for read in graph.reads:
            value = self._frozen[read] if read in self._frozen else self._buffers.now(read)
            binding.bind_ortvalue_input(read, value)
        for tensor in graph.outputs:
            binding.bind_output(tensor.name, "cpu")
        session.run_with_iobinding(binding)
        values = binding.get_outputs()
        return {t.name: v.numpy() for t, v in zip(graph.outputs, values, strict=True)}


def _plain(value: np.ndarray[Any, Any]) -> Any:
    return value.item() if value.ndim == 0 else value


def batches_of(
    arrays: Mapping[str, np.ndarray[Any, Any]],
    size: int,
    *,
    seed: int | None = None,
    drop_last: bool = False,
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Cut arrays into batches of so many rows, shuffled if there is a seed."""
    count = min(len(array) for array in arrays.values())
    order = np.arange(count)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    for start in range(0, count - size + 1 if drop_last else count, size):
        rows = order[start : start + size]
        yield {name: np.ascontiguousarray(array[rows]) for name, array in arrays.items()}
