"""Every exception that the runtime raises on purpose."""

from __future__ import annotations

from mpgraph.errors import MPGraphError


class FolderError(MPGraphError):
    """A folder is no exported step, is damaged, or of a version that cannot be read."""


class BatchError(MPGraphError, ValueError):
    """A batch has other names, shapes or dtypes than the exported step takes."""


class RuntimeSupportError(MPGraphError):
    """The installed onnxruntime cannot run the step, or does not compute what it says."""
