"""Files of named arrays, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mpgraph.runtime.batch import Arrays
from mpgraph.runtime.errors import FolderError


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """The arrays of a safetensors file, and its metadata.

    Raises:
        FolderError: There is no such file, or it is damaged.
    """
    try:
        with safe_open(str(path), framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise FolderError(f"there is no file {path}.") from None
    except (SafetensorError, OSError) as error:
        raise FolderError(f"{path} is damaged: {error}") from error


def write_arrays(path: Path, arrays: Arrays, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; what was there before stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(arrays, name, metadata=dict(metadata))
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
