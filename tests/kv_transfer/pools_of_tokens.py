"""Pools that hold known tokens, laid out and read back with torch: the reference that conversions are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kernels.kv_order import to_paired, to_plain
from kv_transfer.pool import LocalPool, PoolMemory
from tandem.kv_layout import PAIRED_ORDER, KvLayout

TORCH = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}


def random_tokens(layout: KvLayout, tokens: int, seed: int = 0) -> torch.Tensor:
    """Codes [layers, 2, all heads, tokens, head_dim] of the layout's dtype; any bits that are a number."""
    shape = (layout.num_layers, 2, layout.total_kv_heads, tokens, layout.head_dim)
    generator = torch.Generator().manual_seed(seed)
    if layout.dtype == "int8":
        return torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
    return (torch.randn(shape, generator=generator) * 3).to(TORCH[layout.dtype])


def random_scales(layout: KvLayout, tokens: int) -> torch.Tensor:
    """What `write_tokens` gives tokens of quantized layouts: [layers, 2, all heads, tokens, 1]; else 1."""
    shape = (layout.num_layers, 2, layout.total_kv_heads, tokens, 1)
    if not layout.quantized:
        return torch.ones(shape)
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) + 0.5


def as_bits(codes: torch.Tensor) -> torch.Tensor:
    """The same bytes as whole numbers, which compare where floats (NaN, -0) don't."""
    return codes.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[codes.element_size()])


def block_tensor(pool: PoolMemory, layout: KvLayout, block: int) -> torch.Tensor:
    """One block's elements in its own order: a view [layers, 2, heads, block_size, head_dim]."""
    start = block * layout.block_bytes
    raw = torch.frombuffer(pool.buffer, dtype=torch.uint8)[start : start + layout.data_bytes]
    shape = (layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
    return raw.view(TORCH[layout.dtype]).view(shape)


def scale_tensor(pool: PoolMemory, layout: KvLayout, block: int) -> torch.Tensor:
    """One block's scales: a view [layers, 2, heads, block_size]."""
    start = block * layout.block_bytes
    raw = torch.frombuffer(pool.buffer, dtype=torch.uint8)[start + layout.scales_at : start + layout.block_bytes]
    return raw.view(torch.float32).view(layout.num_layers, 2, layout.num_kv_heads, layout.block_size)


def write_tokens(pools: Sequence[PoolMemory], layout: KvLayout, blocks: Sequence[int], codes: torch.Tensor) -> None:
    """Lay out tokens from 0 on in the pools of all ranks, with `random_scales`."""
    size, heads = layout.block_size, layout.num_kv_heads
    scales = random_scales(layout, codes.shape[3])[..., 0]
    for rank, pool in enumerate(pools):
        own = slice(rank * heads, (rank + 1) * heads)
        for place, block in enumerate(blocks):
            tokens = slice(place * size, (place + 1) * size)
            part = codes[:, :, own, tokens]
            if not part.shape[3]:
                break
            padded = torch.zeros_like(block_tensor(pool, layout, block))
            padded[:, :, :, : part.shape[3]] = part
            block_tensor(pool, layout, block).copy_(to_paired(padded) if layout.order == PAIRED_ORDER else padded)
            if layout.quantized:
                scale_tensor(pool, layout, block)[..., : part.shape[3]] = scales[:, :, own, tokens]


def read_codes(pools: Sequence[PoolMemory], layout: KvLayout, blocks: Sequence[int], tokens: int) -> torch.Tensor:
    """Codes [layers, 2, all heads, tokens, head_dim] of the first tokens."""
    ranks = []
    for pool in pools:
        tensors = [block_tensor(pool, layout, block) for block in blocks]
        plain = [to_plain(tensor) if layout.order == PAIRED_ORDER else tensor for tensor in tensors]
        ranks.append(torch.cat(plain, 3)[:, :, :, :tokens])
    return torch.cat(ranks, 2)


def read_values(pools: Sequence[PoolMemory], layout: KvLayout, blocks: Sequence[int], tokens: int) -> torch.Tensor:
    """What the first tokens' codes are worth, float32."""
    values = read_codes(pools, layout, blocks, tokens).float()
    if layout.quantized:
        values = values * read_scales(pools, layout, blocks, tokens)
    return values


def read_scales(pools: Sequence[PoolMemory], layout: KvLayout, blocks: Sequence[int], tokens: int) -> torch.Tensor:
    """Scales [layers, 2, all heads, tokens, 1] of the first tokens of a quantized layout."""
    ranks = [torch.cat([scale_tensor(pool, layout, block) for block in blocks], 3) for pool in pools]
    return torch.cat(ranks, 2)[:, :, :, :tokens, None]


def make_pools(layout: KvLayout, num_blocks: int) -> list[LocalPool]:
    """One pool a rank."""
    return [LocalPool(num_blocks, layout.block_bytes) for _ in range(layout.tp_size)]


def with_ranks(layout: KvLayout, ranks: int) -> KvLayout:
    """The same heads over `ranks` ranks."""
    return replace(layout, tp_size=ranks, num_kv_heads=layout.total_kv_heads // ranks)
