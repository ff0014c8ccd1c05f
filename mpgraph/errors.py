"""Every exception that mpgraph raises on purpose."""

from __future__ import annotations


class MPGraphError(Exception):
    """Base class: catching it catches every error that mpgraph raises on purpose."""


class CaptureError(MPGraphError):
    """The model, or this call of it, cannot be turned into a graph that trains the same."""


class PolicyError(MPGraphError, ValueError):
    """A policy, preset or override is malformed, matches nothing, or is violated."""


class PrecisionError(MPGraphError, ValueError):
    """The requested precision is unknown, or does not fit the model or its parameters."""


class CallError(MPGraphError, TypeError):
    """A converted module was called with arguments that its ``forward`` does not take."""


class ExportError(MPGraphError):
    """A model, or this call of it, cannot be written as an ONNX file; or the file is wrong."""


class VerificationError(MPGraphError, AssertionError):
    """mpgraph broke one of its own invariants: a bug in mpgraph, not in the user's model."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"{message}\nThis is a bug in mpgraph, not in your model. Please report it with the "
            "traceback and the smallest model that shows it."
        )
