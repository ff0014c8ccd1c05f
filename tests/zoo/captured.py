"""The second reference: the captured graph as it is, run under ``torch.autocast``.

A model may do something else while it is traced than in eager mode (transformers looks at the
values of an attention mask only in the latter). Where a converted model differs from eager
autocast but not from this reference, the passes have done their work, and the path differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from .subject import DTYPES, converter


@contextlib.contextmanager
def unrewritten(precision: str, device: str) -> Iterator[None]:
    """Let converted models, while this is active, run what was captured, under autocast."""
    from mpgraph.capture import engines
    from mpgraph.specialisation import Specialisation

    def run_call(self: Any, model: Any, leaves: Sequence[Any], args: Any, kwargs: Any) -> Any:
        with torch.autocast(device, DTYPES[precision]):
            return self(leaves)

    with (
        mock.patch.object(engines, "run_passes", _keep),
        mock.patch.object(Specialisation, "run_call", run_call),
    ):
        yield


def _keep(gm: fx.GraphModule, passes: Any, context: Any) -> list[Any]:
    for body in (gm, *(m for m in gm.modules() if isinstance(m, fx.GraphModule))):
        for node in list(body.graph.nodes):
            if node.target is torch.ops.aten._assert_tensor_metadata.default:
                body.graph.erase_node(node)  # of dtypes before autocast casts
        body.recompile()
    return []


def captured(model: nn.Module, precision: str, policy: str) -> nn.Module:
    """Return the model such that it runs its captured graph; for use inside `unrewritten`."""
    return converter("export", precision, policy)(model)
