"""Random numbers of a compiled step."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.decomposition import select_decomp_table

aten = torch.ops.aten


def decompositions() -> dict[Any, Any]:
    """Inductor's table, with ``bernoulli`` on a CPU as a comparison of random numbers.

    That is what Inductor makes of it on a GPU. On a CPU it keeps an operator that writes in place,
    and may fuse what reads the result into a kernel that runs before the write (torch 2.11 to 2.13:
    dropout inside of attention gives NaN when its mask is kept for the backward pass).
    """
    return {**select_decomp_table(), aten.bernoulli.p: _bernoulli}


def _bernoulli(x: torch.Tensor, p: float = 0.5, *, generator: Any = None) -> torch.Tensor:
    falls_back = inductor_config.fallback_random
    if generator is not None or (falls_back and x.device.type != "cpu"):
        return NotImplemented  # type: ignore[no-any-return]
    if falls_back:
        # The mask of dropout, which eager mode draws by the same kernel from the same generator.
        ones = torch.ones_like(x, dtype=torch.float32)
        mask: torch.Tensor = aten.native_dropout.default(ones, 1.0 - p, True)[1]
    else:
        mask = torch.rand_like(x, dtype=torch.float32) < p
    return mask.to(x.dtype)
