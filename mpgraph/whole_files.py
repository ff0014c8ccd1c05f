"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


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
