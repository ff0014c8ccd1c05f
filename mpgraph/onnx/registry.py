"""torchlib's translations of operators, read once for each opset."""

from __future__ import annotations

import functools
import logging
from typing import Any

from mpgraph.onnx.translations import translations


@functools.cache
def registry(opset: int) -> Any:
    """The table of translations for an opset; building it takes more than a second."""
    from torch.onnx._internal.exporter import _registration

    logger = logging.getLogger(_registration.__name__)
    before, logger.level = logger.level, logging.ERROR  # torchvision need not be there
    try:
        found = _registration.ONNXRegistry.from_torchlib(opset_version=opset)
    finally:
        logger.setLevel(before)

    def known(target: Any) -> Any:
        return found.get_decomps(target)[0].onnx_function

    for target, function in translations(opset, known).items():
        found.register_op(target, function)
    return found
