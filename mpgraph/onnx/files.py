"""ONNX files that are there whole or not at all, with their external data."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpgraph.errors import ExportError
from mpgraph.onnx.extra import library

# A protobuf message holds less than 2 GB; the graph itself needs room too.
LARGEST_FILE = 1_900_000_000


def target_path(path: str | os.PathLike[str]) -> Path:
    """Where the file is to be.

    Raises:
        ExportError: The folder is missing, or the path is a folder.
    """
    file = Path(path)
    if not file.parent.is_dir():
        raise ExportError(f"the folder {str(file.parent)!r} does not exist; create it first")
    if file.is_dir():
        raise ExportError(f"{str(file)!r} is a folder; give the name of a file in it")
    return file


@contextlib.contextmanager
def unfinished(file: Path) -> Iterator[Path]:
    """A file to write to, of the same name in a folder next to it; put in place at the end."""
    folder = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    folder.mkdir()
    try:
        yield folder / file.name
        # The data first: a file whose data is missing does not load.
        for written in sorted(folder.iterdir(), key=lambda p: p.name == file.name):
            os.replace(written, file.with_name(written.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(model: Any, file: Path, external_data: bool | None) -> int:
    """Write an ``onnx_ir`` model, its weights in ``<name>.data`` if they are large or if asked.

    Returns:
        The number of bytes written.
    """
    onnx_ir = library("onnx_ir")

    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    apart = weights > LARGEST_FILE if external_data is None else external_data
    onnx_ir.save(model, file, external_data=f"{file.name}.data" if apart else None)
    return sum(path.stat().st_size for path in file.parent.iterdir())


def check(file: Path) -> None:
    """Check the file with onnx's own checker, shapes and dtypes included.

    Raises:
        ExportError: It is not valid.
    """
    onnx = library("onnx")

    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:
        raise ExportError(
            f"onnx.checker refuses {file.name}: {error}. Nothing was written. Please report this."
        ) from error
