"""Write a model as an ONNX inference file, and check it in onnxruntime.

mpgraph export train.py:make_model model.onnx --precision bf16
mpgraph export package.models:small model.onnx --precision fp16 --target cuda --opset 22
"""

from __future__ import annotations

import argparse
import json
import warnings

from mpgraph.cli import subject

HELP = "write a model as an ONNX inference file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("what", metavar="MODULE:FUNCTION", help=subject.WHAT)
    parser.add_argument("out", metavar="OUT.onnx", help="the file to write")
    parser.add_argument("--target", default="cpu", help='"cpu", "cuda", "portable" or "web"')
    parser.add_argument("--opset", type=int, help="18 to 23; the target's own by default")
    parser.add_argument("--io-dtype", default="fp32", choices=("fp32", "native"))
    parser.add_argument("--weights", default="16-bit", choices=("16-bit", "fp32"))
    parser.add_argument("--fixed-sizes", action="store_true", help="the sizes of the example alone")
    parser.add_argument("--external-data", action="store_true", help="weights in OUT.onnx.data")
    parser.add_argument("--no-verify", action="store_true", help="do not compare it with torch")
    parser.add_argument("--json", action="store_true", help="print JSON")
    subject.add_conversion(parser)


def run(options: argparse.Namespace) -> int:
    """Export, and print the report."""
    import mpgraph

    model, inputs = subject.load(options.what)
    model = subject.converted(model, options.precision, options.policy)
    with warnings.catch_warnings():
        # The report says that a model in training mode was exported in eval mode.
        warnings.filterwarnings("ignore", "mpgraph: the model is in training mode")
        report = mpgraph.export_onnx(
            model,
            options.out,
            inputs,
            target=options.target,
            opset=options.opset,
            io_dtype=options.io_dtype,
            weights=options.weights,
            dynamic=not options.fixed_sizes,
            verify=not options.no_verify,
            external_data=options.external_data or None,
        )
    print(json.dumps(report.to_dict(), indent=1, ensure_ascii=False) if options.json else report)
    return 0
