"""What tests of the row promise share: prompts, and bits compared."""

from __future__ import annotations

import torch
from torch import Tensor


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Always the same ones."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocabulary, (count, length), generator=generator).tolist()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """float32 tensors bit by bit: -0 differs from 0, and a NaN equals itself."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))
