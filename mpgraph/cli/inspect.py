"""Show what is in an ONNX file, or what was decided for a model.

mpgraph inspect model.onnx
mpgraph inspect train.py:make_model --precision bf16
"""

from __future__ import annotations

import argparse
import json

from mpgraph.cli import subject

HELP = "what is in an ONNX file, or what was decided for a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("what", metavar="FILE.onnx|MODULE:FUNCTION", help=subject.WHAT)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verbose", action="store_true", help="of a model: list every node")
    subject.add_conversion(parser)


def run(options: argparse.Namespace) -> int:
    """Print it."""
    print(_file(options) if options.what.endswith(".onnx") else _model(options))
    return 0


def _file(options: argparse.Namespace) -> str:
    from mpgraph.onnx.summary import summarize

    summary = summarize(options.what)
    if options.json:
        return json.dumps(summary.to_dict(), indent=1, ensure_ascii=False)
    return summary.text()


def _model(options: argparse.Namespace) -> str:
    import mpgraph

    model, inputs = subject.load(options.what)
    model = subject.converted(model, options.precision, options.policy)
    if isinstance(inputs, dict):
        model(**inputs)
    else:
        model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    report = mpgraph.explain(model)
    return report.to_json().rstrip() if options.json else report.text(verbose=options.verbose)
