"""What is in an exported folder, as data: written by the exporter, read by the runtime."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpgraph.runtime.errors import FolderError

FORMAT = 2
# The format before had no state in pieces, and is read as it was.
READ = (1, FORMAT)
MANIFEST = "manifest.json"
TRAIN, EVALUATE, INFER = "train_step.onnx", "evaluate.onnx", "infer.onnx"
STATE, FROZEN = "state.safetensors", "frozen.safetensors"
ROUNDING, REFERENCE = "rounding.onnx", "reference.safetensors"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One input or output: its name, dtype as numpy spells it, and sizes or their names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class StateTensor(Tensor):
    """A tensor that a step reads and writes.

    Attributes:
        output: The output that holds its next value.
        kind: "parameter", "buffer", "optimizer", "scale", "sum", "random" or "count".
        same: Names of counters that are equal to this one, and stay so.
        in_place: Whether its next value may be written where it lies: in the graph, everything
            that reads it comes before what computes that value.
        pieces: The shape that ``train_step.onnx`` takes and returns it in, where that is not its
            own: the same elements in the same order, in equal pieces.
    """

    output: str
    kind: str
    same: tuple[str, ...] = ()
    in_place: bool = False
    pieces: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Number:
    """A hyperparameter: an input without dimensions, and the value that it had in torch."""

    name: str
    dtype: str
    value: float


@dataclasses.dataclass(frozen=True)
class Graph:
    """A file that computes something from a batch, the state and what is frozen.

    Attributes:
        inputs: The tensors of the batch, or the model's inputs.
        outputs: What it returns, next values of the state aside.
        state: The names of the state tensors and frozen tensors that it reads.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    reads: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an exported folder holds.

    Attributes:
        precision: As for ``mpgraph.convert``.
        target: What the files were made for; ``provider`` is onnxruntime's name of it.
        opset: The version of the ai.onnx operators.
        accumulation_steps: How many batches make one step.
        batch_size: The size of a batch, or the name of a symbolic one.
        state: What a step reads and writes.
        frozen: What never changes.
        numbers: Hyperparameters.
        graphs: By file name, what it takes and returns.
        files: By file name, its SHA-256.
        versions: Of mpgraph, torch, onnx.
        format: The version of this description.
    """

    precision: str
    target: str
    provider: str
    opset: int
    accumulation_steps: int
    batch_size: int | str
    state: tuple[StateTensor, ...]
    frozen: tuple[Tensor, ...]
    numbers: tuple[Number, ...]
    graphs: Mapping[str, Graph]
    files: Mapping[str, str]
    versions: Mapping[str, str]
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        FolderError: There is none, it is damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError(
            f"{folder} has no {MANIFEST}, so it is no exported step. Make one with "
            "step.export_onnx(folder)."
        ) from None
    except ValueError as error:
        raise FolderError(f"{path} is damaged: {error}. Export the step again.") from error
    version = found.get("format") if isinstance(found, dict) else None
    if version not in READ:
        raise FolderError(
            f"{path} has format {version!r}, and this mpgraph reads format {FORMAT}. Export the "
            "step again with this version, or install the one that wrote it: "
            f"{(found.get('versions') or {}).get('mpgraph') if isinstance(found, dict) else None}."
        )
    try:
        return _manifest(found)
    except (KeyError, TypeError) as error:
        raise FolderError(f"{path} is damaged: {error!r}. Export the step again.") from error


def _manifest(found: dict[str, Any]) -> Manifest:
    lists = {
        "state": StateTensor, "frozen": Tensor, "numbers": Number,
    }  # fmt: skip
    given = dict(found)
    for key, kind in lists.items():
        given[key] = tuple(_made(kind, item) for item in found[key])
    given["graphs"] = {name: _graph(item) for name, item in found["graphs"].items()}
    return Manifest(**given)


def _graph(item: Mapping[str, Any]) -> Graph:
    ports = {key: tuple(_made(Tensor, t) for t in item[key]) for key in ("inputs", "outputs")}
    return Graph(**ports, reads=tuple(item["reads"]))


def _made(kind: Any, item: Mapping[str, Any]) -> Any:
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in item.items()})


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            found.update(block)
    return found.hexdigest()


def check_files(folder: Path, manifest: Manifest) -> None:
    """Refuse a folder with a missing or damaged file.

    Raises:
        FolderError: Names the file.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.exists():
            raise FolderError(
                f"{path} is missing. Export the step again, or copy the whole folder."
            )
        if checksum(path) != expected:
            raise FolderError(
                f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}. Copy the folder "
                "again, or export the step again."
            )
