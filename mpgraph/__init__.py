"""Mixed-precision training for PyTorch as a graph rewrite."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives: `import mpgraph` loads none of it, and not torch either.
_HOMES = {
    "convert": "conversion",
    "explain": "report.report",
    "guard": "guarding",
    "TrainStep": "step.train_step",
    "export_onnx": "onnx.export",
    "ExportReport": "onnx.report",
    "blame": "ranges.blame",
    "calibrate": "ranges.calibrate",
    "RangeReport": "ranges.report",
    "assert_policy": "assertions",
    "text": "graph_text",
    "Policy": "policy",
    "Override": "policy",
    "LossScale": "loss_scale",
    "Report": "report.report",
    "MPGraphError": "errors",
    "CallError": "errors",
    "CaptureError": "errors",
    "ExportError": "errors",
    "PolicyError": "errors",
    "PrecisionError": "errors",
    "VerificationError": "errors",
}

if TYPE_CHECKING:
    from mpgraph.assertions import assert_policy as assert_policy
    from mpgraph.conversion import convert as convert
    from mpgraph.errors import CallError as CallError
    from mpgraph.errors import CaptureError as CaptureError
    from mpgraph.errors import ExportError as ExportError
    from mpgraph.errors import MPGraphError as MPGraphError
    from mpgraph.errors import PolicyError as PolicyError
    from mpgraph.errors import PrecisionError as PrecisionError
    from mpgraph.errors import VerificationError as VerificationError
    from mpgraph.graph_text import text as text
    from mpgraph.guarding import guard as guard
    from mpgraph.loss_scale import LossScale as LossScale
    from mpgraph.onnx.export import export_onnx as export_onnx
    from mpgraph.onnx.report import ExportReport as ExportReport
    from mpgraph.policy import Override as Override
    from mpgraph.policy import Policy as Policy
    from mpgraph.ranges.blame import blame as blame
    from mpgraph.ranges.calibrate import calibrate as calibrate
    from mpgraph.ranges.report import RangeReport as RangeReport
    from mpgraph.report.report import Report as Report
    from mpgraph.report.report import explain as explain
    from mpgraph.step.train_step import TrainStep as TrainStep

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpgraph' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"mpgraph.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"mpgraph.{name} needs torch, which is not installed. Install it, or mpgraph with its "
            "extra 'torch'. mpgraph.runtime works without it.",
            name="torch",
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
