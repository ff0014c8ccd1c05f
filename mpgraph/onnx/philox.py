"""Philox 4x32-10, a random number generator without state, in integer operators.

Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3 (SC 2011). A number is
a function of a counter and a key; here the key is the seed, and the counter says which number, of
which node, at which step. int64 throughout, which every runtime has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 1 << 32


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Four words of 32 random bits for each counter of four words, under a key of two."""
    c0, c1, c2, c3 = counter
    for k0, k1 in zip(*map(_keys, key, _WEYL), strict=True):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return [c0, c1, c2, c3]


def _keys(word: Tensor, step: int) -> tuple[Tensor, ...]:
    """The word of the key in each round."""
    steps = torch.tensor([number * step for number in range(ROUNDS)])
    return ((word + steps) & (_WORD - 1)).unbind()


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower word of a product of two words.

    int64 holds a product of 64 bits as two's complement: without its lower word it is a multiple
    of 2**32, which a division leaves exact, its sign included.
    """
    product = x * factor
    lower = product & (_WORD - 1)
    return _divided(product - lower, _WORD) & (_WORD - 1), lower


def uniform(shape: Sequence[Any], stream: int, seed: Tensor, step: Tensor) -> Tensor:
    """Random numbers in [0, 1), multiples of 2**-24, float32.

    Args:
        shape: The shape; its first size may be symbolic.
        stream: Which of several calls of one step this is.
        seed: A tensor without dimensions, int64, from 0.
        step: As seed: which step this is.
    """
    rows = shape[0] if len(shape) else 1
    columns = math.prod(shape[1:])
    blocks = -(-columns // 4)
    index = torch.arange(rows * blocks, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(index)
    counter = [index, zero + stream, *(zero + word for word in _words(step))]
    words = torch.stack(philox(counter, _words(seed)), -1)
    kept = words.view(rows, 4 * blocks)[:, :columns].reshape(tuple(shape))
    return _divided(kept, 256).to(torch.float32) * 2.0**-24


def _words(x: Tensor) -> list[Tensor]:
    return [x & (_WORD - 1), _divided(x, _WORD) & (_WORD - 1)]


def _divided(x: Tensor, by: int) -> Tensor:
    # One ONNX operator: nothing here is negative, or else it is a multiple.
    return torch.div(x, by, rounding_mode="trunc")
