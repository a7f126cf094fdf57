"""Raw pools to raw pools, with random data, against torch's idea of every layout."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from pools_of_tokens import (
    TORCH,
    as_bits,
    block_tensor,
    make_pools,
    random_scales,
    random_tokens,
    read_codes,
    read_scales,
    read_values,
    with_ranks,
    write_tokens,
)

from kernels.kv_codes import quantize_rows
from kv_transfer.conversion import convert
from kv_transfer.plan import plan_transfer
from tandem.kv_layout import PAIRED_ORDER, KvLayout

LAYOUT = KvLayout(block_size=16, dtype="bfloat16", num_layers=2, num_kv_heads=6, head_dim=6)
TOKENS = 75
BLOCKS = 64


def bring(source: KvLayout, target: KvLayout, codes: torch.Tensor, *, most_bytes: int = 1 << 20) -> list:
    """Tokens through a sender's and a reader's pools; the reader's, whose block i is BLOCKS - 1 - i."""
    tokens = codes.shape[3]
    sent, landed = make_pools(source, BLOCKS), make_pools(target, BLOCKS)
    write_tokens(sent, source, range(source.blocks_for(tokens)), codes)
    plan = plan_transfer(source, target)
    for piece in plan.pieces(0, tokens, most_bytes):
        first, size = piece.source_block * source.block_bytes, piece.source_blocks * source.block_bytes
        into = table(target, tokens)[piece.target_block : piece.target_block + piece.target_blocks]
        for rank, runs in enumerate(plan.heads):
            for run in runs:
                staged = sent[run.source_rank].buffer[first : first + size]
                convert(plan, piece, run, staged, landed[rank].buffer, into)
    return landed


def table(layout: KvLayout, tokens: int) -> list[int]:
    return [BLOCKS - 1 - place for place in range(layout.blocks_for(tokens))]


def variants() -> list[KvLayout]:
    paired = [replace(LAYOUT, block_size=size, order=PAIRED_ORDER) for size in (16, 48)]
    plain = [replace(LAYOUT, block_size=size) for size in (5, 16, 24, 32)]
    return [with_ranks(layout, ranks) for layout, ranks in product([*plain, *paired], (1, 2, 3))]


@pytest.mark.parametrize(
    "target", variants(), ids=lambda v: f"{v.block_size}{'p' if 'pairs' in v.order else ''}x{v.tp_size}"
)
def test_equal_dtypes_change_no_bit(target: KvLayout) -> None:
    codes = random_tokens(LAYOUT, TOKENS)
    for source in variants():
        landed = bring(source, target, codes, most_bytes=3 * source.block_bytes)
        got = read_codes(landed, target, table(target, TOKENS), TOKENS)
        assert torch.equal(as_bits(got), as_bits(codes)), f"from {source}"


@pytest.mark.parametrize("dtype", ["float32", "float16", "float8_e4m3", "int8"])
@pytest.mark.parametrize(("size", "step"), [(16, 16), (48, 16), (32, 1), (24, 32)])
def test_every_dtype_is_exact_among_its_own(dtype: str, size: int, step: int) -> None:
    source = with_ranks(replace(LAYOUT, dtype=dtype, block_size=size), 2)
    target = with_ranks(replace(LAYOUT, dtype=dtype, block_size=step), 3)
    codes = random_tokens(source, TOKENS if step > 1 else 60)
    tokens = codes.shape[3]
    landed = bring(source, target, codes)
    assert torch.equal(as_bits(read_codes(landed, target, table(target, tokens), tokens)), as_bits(codes))
    if source.quantized:
        assert torch.equal(read_scales(landed, target, table(target, tokens), tokens), random_scales(source, tokens))


@pytest.mark.parametrize("dtype", ["float8_e4m3", "int8"])
@pytest.mark.parametrize(("size", "step"), [(16, 16), (16, 24), (24, 16)])
def test_eight_bits_come_in_pairs_too(dtype: str, size: int, step: int) -> None:
    """Sizes of pairs in either end, or both."""
    codes = random_tokens(replace(LAYOUT, dtype=dtype), TOKENS)
    orders = [(PAIRED_ORDER, PAIRED_ORDER), (LAYOUT.order, PAIRED_ORDER), (PAIRED_ORDER, LAYOUT.order)]
    for first, second in orders:
        source = replace(LAYOUT, dtype=dtype, block_size=size, order=first)
        target = replace(source, block_size=step, order=second)
        landed = bring(source, target, codes)
        assert torch.equal(as_bits(read_codes(landed, target, table(target, TOKENS), TOKENS)), as_bits(codes))
        assert torch.equal(read_scales(landed, target, table(target, TOKENS), TOKENS), random_scales(source, TOKENS))


def tolerance(dtype: str, values: torch.Tensor) -> torch.Tensor:
    """The most that one rounding may change each value by: relative for floats, of the row's largest for int8."""
    most = values.abs().amax(-1, keepdim=True).expand_as(values)
    relative = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float8_e4m3": 2.0**-4, "int8": 0.0}[dtype]
    absolute = {"float16": 2.0**-25, "float8_e4m3": 2.0**-10 / 448, "int8": 0.5 / 127}.get(dtype, 0.0)
    scale = most if dtype in ("float8_e4m3", "int8") else torch.ones_like(most)
    return 1.0001 * (relative * values.abs() + absolute * scale)


DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3", "int8"]


@pytest.mark.parametrize(("size", "step"), [(16, 16), (16, 32), (32, 16), (16, 24), (24, 16), (5, 48)])
@pytest.mark.parametrize(("first", "second"), [pair for pair in product(DTYPES, DTYPES) if pair[0] != pair[1]])
def test_another_dtype_rounds_once(first: str, second: str, size: int, step: int) -> None:
    source = with_ranks(replace(LAYOUT, dtype=first, block_size=size), 2)
    target = replace(LAYOUT, dtype=second, block_size=step)
    codes = random_tokens(source, TOKENS)
    values = codes.float() * random_scales(source, TOKENS)
    landed = bring(source, target, codes)
    got = read_values(landed, target, table(target, TOKENS), TOKENS)
    assert ((got - values).abs() <= tolerance(second, values)).all()
    assert torch.equal(got, values) or second != "float32"


@pytest.mark.parametrize("order", [LAYOUT.order, PAIRED_ORDER])
@pytest.mark.parametrize("dtype", ["float8_e4m3", "int8"])
def test_codes_and_scales_are_those_that_engines_write(dtype: str, order: str) -> None:
    """A prompt quantized on its way is a prompt computed by a worker with such a cache, but for what bfloat16 lost."""
    codes = random_tokens(LAYOUT, TOKENS)
    target = replace(LAYOUT, dtype=dtype, block_size=24, order=order)
    landed = bring(LAYOUT, target, codes)
    want, scales = quantize_rows(codes.float(), TORCH[dtype])
    assert torch.equal(as_bits(read_codes(landed, target, table(target, TOKENS), TOKENS)), as_bits(want))
    assert torch.equal(read_scales(landed, target, table(target, TOKENS), TOKENS), scales[..., None])


@pytest.mark.parametrize("dtype", ["float8_e4m3", "int8"])
def test_there_and_back_is_within_the_formats_error(dtype: str) -> None:
    codes = random_tokens(LAYOUT, TOKENS)
    quantized = replace(LAYOUT, dtype=dtype, block_size=32)
    paired = replace(LAYOUT, order=PAIRED_ORDER)
    there = bring(LAYOUT, quantized, codes)
    back = make_pools(paired, BLOCKS)
    plan = plan_transfer(quantized, paired)
    for place, block in enumerate(table(quantized, TOKENS)):
        start, end = 32 * place, min(32 * place + 32, TOKENS)
        (piece,) = plan.pieces(start, end, 1 << 20)
        staged = there[0].buffer[block * quantized.block_bytes : (block + 1) * quantized.block_bytes]
        into = table(paired, TOKENS)[piece.target_block : piece.target_block + piece.target_blocks]
        convert(plan, piece, plan.heads[0][0], staged, back[0].buffer, into)
    got = read_values(back, paired, table(paired, TOKENS), TOKENS)
    rounded = tolerance(dtype, codes.float())
    assert ((got - codes.float()).abs() <= rounded + tolerance("bfloat16", got)).all()


@pytest.mark.parametrize("order", [LAYOUT.order, PAIRED_ORDER])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slots_behind_the_last_token_and_other_blocks_are_left_alone(order: str, dtype: str) -> None:
    source = replace(LAYOUT, dtype=dtype, block_size=24)
    target = replace(LAYOUT, block_size=32, order=order)
    landed = bring(source, target, random_tokens(source, 39))
    codes = read_codes(landed, target, table(target, 64), 64)
    assert codes[:, :, :, :39].float().abs().amin((0, 1, 2, 4)).gt(0).all()
    assert not codes[:, :, :, 39:].any()
    assert not torch.cat([block_tensor(landed[0], target, block) for block in range(BLOCKS - 2)]).any()


@pytest.mark.parametrize("dtype", ["float8_e4m3", "int8"])
def test_what_is_no_number_stays_visible_in_its_row_alone(dtype: str) -> None:
    codes = random_tokens(LAYOUT, 16)
    codes[0, 0, 0, 3, 2] = float("inf")
    codes[0, 1, 1, 3, 2] = float("nan")
    target = replace(LAYOUT, dtype=dtype)
    got = read_values(bring(LAYOUT, target, codes), target, table(target, 16), 16)
    finite = codes.isfinite().all(-1)
    assert got[~finite].isnan().all()
    assert ((got - codes.float()).abs() <= tolerance(dtype, codes.float()))[finite].all()
