"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpgraph.errors import MPGraphError


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file next to ``path``, and give it that name once it is complete."""
    target = Path(path)
    # The ending stays: some writers choose a format by it.
    unfinished = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        write(unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def to_json(values: Any, path: str | os.PathLike[str] | None) -> str:
    """A report's values as JSON text; with a path, also written there."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if path is not None:
        write_whole(path, lambda file: file.write_text(text, encoding="utf-8", newline="\n"))
    return text


def load_json(path: str | os.PathLike[str]) -> Any:
    """What :func:`to_json` wrote."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MPGraphError(f"cannot load a report from {os.fspath(path)!r}: {error}") from error
