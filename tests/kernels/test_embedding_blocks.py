"""Embedding rows and block copies: equal to torch, and ids or blocks out of range are refused before any write."""

from __future__ import annotations

import pytest
import torch

from kernels.blocks import copy_blocks, copy_blocks_reference
from kernels.embedding import embedding, embedding_reference
from tandem.errors import InternalError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "width"), [(0, 8), (1, 576), (50, 33)])
def test_embedding_equals_torch(
    implementation: str, dtype: torch.dtype, count: int, width: int, generator: torch.Generator
) -> None:
    table = torch.randn(97, width, generator=generator).to(dtype)
    ids = torch.randint(0, 97, (count,), generator=generator)
    actual = embedding(ids, table)
    assert actual.dtype is torch.float32
    assert torch.equal(actual, embedding_reference(ids, table))


@pytest.mark.parametrize("bad", [-1, 97, 2**40])
def test_embedding_refuses_an_unknown_id(implementation: str, bad: int) -> None:
    out = torch.full((3, 4), 7.0)
    with pytest.raises(InternalError, match="outside"):
        embedding(torch.tensor([1, 2, bad]), torch.zeros(97, 4), out)
    assert bool((out == 7.0).all())


def test_embedding_names_wrong_arguments() -> None:
    with pytest.raises(InternalError, match="ids must be"):
        embedding(torch.zeros(3, dtype=torch.int32), torch.zeros(9, 4))
    with pytest.raises(InternalError, match="table must be"):
        embedding(torch.zeros(3, dtype=torch.int64), torch.zeros(9, 4).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_happen_in_order(implementation: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    cache = torch.randn(9, 2, 2, 3, 5, 8, generator=generator).to(dtype)
    expected = cache.clone()
    pairs = [(0, 1), (1, 2), (8, 0), (3, 3)]
    copy_blocks_reference(expected, pairs)
    copy_blocks(cache, pairs)
    copy_blocks(cache, [])
    assert torch.equal(cache, expected)
    assert torch.equal(cache[2], cache[1])


@pytest.mark.parametrize("bad", [(0, 9), (-1, 0), (9, 0), (0, -1)])
def test_a_block_outside_is_refused_before_any_copy(implementation: str, bad: tuple[int, int]) -> None:
    cache = torch.arange(9.0)[:, None].repeat(1, 4)
    before = cache.clone()
    with pytest.raises(InternalError, match="outside"):
        copy_blocks(cache, [(0, 1), bad])
    assert torch.equal(cache, before)


def test_a_strided_cache_is_refused() -> None:
    with pytest.raises(InternalError, match="cache must be"):
        copy_blocks(torch.zeros(4, 6).T, [(0, 1)])
