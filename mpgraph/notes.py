"""What mpgraph adds to an error that is not its own: the place in the user's model."""

from __future__ import annotations

import traceback

import torch

from mpgraph import ir


def add_place(error: Exception, gm: torch.fx.GraphModule) -> None:
    """Note on an error of an operator which node failed, and the line of the user's model."""
    names = {node.name: node for node in gm.graph.nodes}
    for frame in traceback.extract_tb(error.__traceback__):
        name = (frame.line or "").partition(" = ")[0].partition(":")[0].strip()
        if frame.filename.startswith("<eval_with_key>") and name in names:
            node = names[name]
            note = f"mpgraph: in node %{name} ({node.target}), from {ir.source_line(node)}"
            add_note(error, note)
            return


def add_note(error: Exception, note: str) -> None:
    """As ``BaseException.add_note``, which came with Python 3.11."""
    vars(error).setdefault("__notes__", []).append(note)
