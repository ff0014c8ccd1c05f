"""Warnings that point at the user's line."""

from __future__ import annotations

import contextlib
import sys
import types
import warnings

from mpgraph.places import is_foreign

_BETWEEN = frozenset({contextlib.__file__, warnings.__file__})


def warn(message: str) -> None:
    """Warn from the innermost line that is not mpgraph's, torch's or contextlib's."""
    frame = _users_frame(sys._getframe(1))
    warnings.warn_explicit(
        f"mpgraph: {message}",
        UserWarning,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__") or "<unknown>",
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _users_frame(frame: types.FrameType) -> types.FrameType:
    """``warnings.warn`` counts frames instead; only Python 3.12 can leave out whole folders."""
    innermost = frame
    while _is_between(frame.f_code.co_filename):
        if frame.f_back is None:
            return innermost
        frame = frame.f_back
    return frame


def _is_between(filename: str) -> bool:
    return filename in _BETWEEN or is_foreign(filename)
