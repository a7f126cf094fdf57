"""Blocks copied, gathered and scattered in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels.blocks import copy_blocks_reference
from kernels.triton.blocks import copy_blocks, gather_blocks, scatter_blocks
from tandem.errors import InternalError


def make_cache(dtype: torch.dtype, width: int) -> torch.Tensor:
    numbers = torch.randint(-100, 100, (9, 3, 2, width), generator=torch.Generator().manual_seed(1))
    return numbers.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("width", [1, 5, 1500])
@pytest.mark.parametrize("layers", [slice(None), slice(1, 3)])
def test_blocks_are_moved(dtype: torch.dtype, width: int, layers: slice) -> None:
    """A range of layers of a larger cache too: nothing beside it is touched."""
    whole = make_cache(dtype, width)
    cache, ids = whole[:, layers], torch.tensor([8, 0, 3])
    expected = whole.clone()
    taken = gather_blocks(cache, ids)
    assert torch.equal(taken.view(torch.uint8), expected[:, layers][ids].view(torch.uint8))
    copy_blocks(cache, [(1, 2), (1, 4), (7, 5)])
    copy_blocks_reference(expected[:, layers], [(1, 2), (1, 4), (7, 5)])
    scatter_blocks(cache, torch.tensor([6, 1, 7]), taken)
    expected[:, layers].view(torch.uint8)[torch.tensor([6, 1, 7])] = taken.view(torch.uint8)
    assert torch.equal(whole.view(torch.uint8), expected.view(torch.uint8))


def test_nothing_to_move() -> None:
    cache = make_cache(torch.float32, 4)
    copy_blocks(cache, [])
    none = torch.empty(0, dtype=torch.int64)
    scatter_blocks(cache, none, gather_blocks(cache, none))


def test_wrong_copies_are_refused() -> None:
    cache = make_cache(torch.float32, 4)
    with pytest.raises(InternalError, match=r"outside \[0, 9\)"):
        copy_blocks(cache, [(1, 9)])
    for pairs in ([(1, 2), (3, 2)], [(1, 2), (2, 3)]):
        with pytest.raises(InternalError, match="depend on their order"):
            copy_blocks(cache, pairs)
    with pytest.raises(InternalError, match="cache must be"):
        copy_blocks(cache.transpose(1, 2), [(1, 2)])
    with pytest.raises(InternalError, match="blocks must be"):
        scatter_blocks(cache, torch.tensor([1, 2]), cache[:3].contiguous())
