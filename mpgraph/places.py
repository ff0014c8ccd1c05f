"""Which source files are the user's own."""

from __future__ import annotations

from pathlib import Path

import torch

# Whole folders, not names: a user's own path may well contain "/torch/" or "/mpgraph/".
_PACKAGE = Path(__file__).parent
_FOREIGN = tuple(
    f"{folder}/"
    for folder in {Path(torch.__file__).parent, _PACKAGE, (_PACKAGE / "passes").resolve()}
)


def is_users(filename: str) -> bool:
    """Whether a file is the user's own: not torch's, not mpgraph's, not generated."""
    return not filename.startswith(("<", *_FOREIGN))
