"""Which source files are the user's own."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

# Whole folders, not names: a user's own path may well contain "/torch/" or "/mpgraph/".
_PACKAGE = Path(__file__).parent
_OURS = (f"{_PACKAGE}/", f"{(_PACKAGE / 'passes').resolve()}/")
_FOLDERS = (f"{Path(torch.__file__).parent}/", *_OURS)
_LIBRARIES = tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "purelib", "platlib"))
_GENERATED = ("<eval_with_key>", "<frozen ")


def is_foreign(filename: str) -> bool:
    """Whether a file is torch's or mpgraph's, or code that they have generated."""
    return filename.startswith((*_GENERATED, *_FOLDERS))


def is_mpgraphs(filename: str) -> bool:
    """Whether a file is one of this package."""
    return filename.startswith(_OURS)


def is_users(filename: str) -> bool:
    """Whether a file is the user's own, and can be read: not what was typed at a prompt."""
    return not filename.startswith("<") and not is_foreign(filename)


def is_own_file(filename: str) -> bool:
    """Whether a file is of the user's own project: no library's that is installed."""
    return not is_foreign(filename) and not filename.startswith(_LIBRARIES)
