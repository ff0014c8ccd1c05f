"""The ``mpgraph`` command: one module per sub-command.

A module of a sub-command has ``HELP``, ``add_arguments(parser)`` and ``run(options) -> int``. It
imports torch, onnx and the like inside of ``run``, so that ``mpgraph --help`` is fast. To add one,
add its name to ``COMMANDS``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from mpgraph.errors import MPGraphError

COMMANDS = ("inspect", "export", "finetune", "verify")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command; the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    try:
        code = int(options.run(options))
        sys.stdout.flush()  # here, where it may be that nobody reads any more
        return code
    except BrokenPipeError:  # as of "mpgraph inspect FILE | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        return 1
    except MPGraphError as error:
        print(f"mpgraph: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    from mpgraph import __version__

    parser = argparse.ArgumentParser(
        prog="mpgraph", description="Mixed precision for PyTorch as a graph that you can read."
    )
    parser.add_argument("--version", action="version", version=f"mpgraph {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in COMMANDS:
        module: Any = importlib.import_module(f"mpgraph.cli.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
