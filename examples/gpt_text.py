"""Text for the GPT, byte by byte: the manual that ships with Python, and how to cut batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

VALIDATION_BATCHES = 8


def english(device: torch.device) -> tuple[Tensor, Tensor]:
    """The reference manual inside Python as bytes: the first nine tenths, and the rest."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.tensor(list(text), dtype=torch.long, device=device)
    split = len(data) * 9 // 10
    return data[:split], data[split:]


def windows(data: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The pieces of ``data`` that begin at ``starts``, and the same pieces one byte later."""
    index = starts[:, None] + torch.arange(length, device=data.device)
    return data[index], data[index + 1]


def training_batches(
    data: Tensor, length: int, batch: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from random places, without end; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - length, (batch,), generator=generator)
        yield windows(data, starts.to(data.device), length)


def validation_batches(data: Tensor, length: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """A few batches spread evenly over ``data``, always the same."""
    starts = torch.linspace(0, len(data) - length - 1, VALIDATION_BATCHES * batch).long()
    parts = starts.to(data.device).chunk(VALIDATION_BATCHES)
    return [windows(data, part, length) for part in parts]
