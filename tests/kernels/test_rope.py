"""Rotary embedding and the cache write: bit-equal to torch on every path, nothing else touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kernels.rope import rope_and_store, rope_and_store_reference
from tandem.errors import InternalError

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]


def tables(half: int, max_positions: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(max_positions)[:, None] * (10000.0 ** -(torch.arange(half) / max(half, 1)))[None]
    return angles.cos().contiguous(), angles.sin().contiguous()


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "half", "block_size"),
    [(0, 2, 1, 8, 4, 16), (1, 9, 3, 64, 32, 16), (33, 3, 3, 40, 20, 7), (70, 8, 1, 64, 16, 1), (5, 4, 2, 256, 128, 32)],
)
def test_matches_torch_bit_for_bit(
    implementation: str,
    cache_dtype: torch.dtype,
    interleaved: bool,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    half: int,
    block_size: int,
    generator: torch.Generator,
    same_bits: SameBits,
) -> None:
    cos, sin = tables(half)
    num_blocks = tokens // block_size + 4
    cache = torch.randn(num_blocks, 3, 2, kv_heads, block_size, dim, generator=generator).to(cache_dtype)
    expected_cache = cache.clone()
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator)
    positions = torch.randint(0, 500, (tokens,), generator=generator)
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:tokens]
    q = rope_and_store(qkv, positions, slots, cos, sin, cache[:, 1], heads, kv_heads, interleaved=interleaved)
    expected_q = rope_and_store_reference(qkv, positions, slots, cos, sin, expected_cache[:, 1], heads, interleaved)
    assert same_bits(q, expected_q)
    assert torch.equal(cache, expected_cache)


@pytest.mark.parametrize("fixed", [None, (0.02, 0.001)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("kv_heads", "dim", "block_size"), [(3, 64, 16), (2, 40, 7), (1, 256, 1)])
def test_codes_and_scales_are_torchs_to_the_bit(
    implementation: str,
    dtype: torch.dtype,
    fixed: tuple[float, float] | None,
    kv_heads: int,
    dim: int,
    block_size: int,
    generator: torch.Generator,
    same_bits: SameBits,
) -> None:
    """Also of rows that are zero, tiny, huge or no numbers."""
    tokens, (cos, sin) = 40, tables(dim // 2)
    blocks = -(-tokens // block_size) + 1
    shape = (blocks, 2, 2, kv_heads, block_size)
    qkv = torch.randn(tokens, 3 * kv_heads * dim, generator=generator)
    qkv *= torch.tensor([1.0, 0.0, 1e-38, 3e-42, 1e30, 1e-6, 400.0, 1.0]).repeat(5)[:, None]
    qkv[7, -1], qkv[15, dim * kv_heads], qkv[23, -dim] = torch.nan, torch.inf, -torch.inf
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    step = (qkv, torch.arange(tokens), slots, cos, sin)
    caches = [torch.zeros(*shape, dim, dtype=dtype) for _ in range(2)]
    scales = [torch.zeros(shape) for _ in range(2)]
    rope_and_store(*step, caches[0][:, 1], kv_heads, kv_heads, kv_scales=scales[0][:, 1], fixed_scales=fixed)
    rope_and_store_reference(*step, caches[1][:, 1], kv_heads, False, scales[1][:, 1], fixed)
    assert torch.equal(caches[0].view(torch.uint8), caches[1].view(torch.uint8))
    assert same_bits(scales[0].nan_to_num(7.0), scales[1].nan_to_num(7.0))
    assert int(scales[0].isnan().sum()) == 3
    assert not scales[0][:, 0].any()


def test_bf16_rounds_as_torch(cpp: None) -> None:
    values = torch.tensor([1.00390625, 1.01171875, 3.4e38, -3.4e38, 1e-40, torch.inf, -torch.inf, torch.nan])
    cache = torch.zeros(1, 1, 2, 1, 1, 8, dtype=torch.bfloat16)
    qkv = torch.cat([torch.zeros(16), values])[None]
    zero = torch.zeros(1, dtype=torch.int64)
    rope_and_store(qkv, zero, zero, torch.ones(1, 4), torch.zeros(1, 4), cache[:, 0], 1, 1)
    stored, expected = cache[0, 0, 1, 0, 0], values.to(torch.bfloat16)
    assert torch.equal(stored[:7], expected[:7])
    assert bool(stored[7].isnan())


def by_slot(cache: torch.Tensor) -> torch.Tensor:
    """Return a one-layer cache as [slots, 2, Hkv, D]."""
    return cache[:, 0].permute(0, 3, 1, 2, 4).flatten(0, 1)


def test_a_row_has_the_same_bits_in_any_batch(
    cpp: None, threads: int, generator: torch.Generator, same_bits: SameBits
) -> None:
    cos, sin = tables(32)
    qkv = torch.randn(512, 15 * 64, generator=generator)
    positions, slots = torch.randint(0, 500, (512,), generator=generator), torch.arange(512)
    cache = torch.zeros(32, 1, 2, 3, 16, 64)
    whole = rope_and_store(qkv, positions, slots, cos, sin, cache[:, 0], 9, 3)
    for size in [*range(1, 65), 511]:
        other = torch.zeros_like(cache)
        rows = slice(size * 3 % (513 - size), size * 3 % (513 - size) + size)
        part = rope_and_store(qkv[rows], positions[rows], slots[rows], cos, sin, other[:, 0], 9, 3)
        assert same_bits(part, whole[rows]), size
        stored, expected = by_slot(other)[rows], by_slot(cache)[rows]
        assert same_bits(stored, expected), size
        assert int(other.count_nonzero()) == int(stored.count_nonzero()), size


def test_wrong_arguments_are_named(implementation: str) -> None:
    cos, sin = tables(4, 10)
    cache = torch.zeros(2, 1, 2, 1, 4, 8)
    index = torch.zeros(1, dtype=torch.int64)
    qkv = torch.zeros(1, 24)

    def call(**changes: object) -> None:
        arguments = {"qkv": qkv, "positions": index, "slots": index, "cos": cos, "sin": sin, "kv_layer": cache[:, 0]}
        rope_and_store(**{**arguments, "num_heads": 1, "num_kv_heads": 1, **changes})  # type: ignore[arg-type]

    call()
    for name, value in (
        ("qkv", torch.zeros(1, 25)),
        ("positions", torch.zeros(2, dtype=torch.int64)),
        ("slots", index.int()),
        ("sin", sin[:5]),
        ("kv_layer", cache[:, 0].transpose(2, 3)),
    ):
        with pytest.raises(InternalError, match=f"{name} must be"):
            call(**{name: value})
    for name, value in (
        ("positions", index + 10),
        ("positions", index - 1),
        ("slots", index + 8),
        ("slots", index - 1),
    ):
        with pytest.raises(InternalError, match="token 0: position"):
            call(**{name: value})
    with pytest.raises(InternalError, match="head_dim 8"):
        call(cos=torch.ones(10, 5), sin=torch.ones(10, 5))
