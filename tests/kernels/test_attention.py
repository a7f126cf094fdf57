"""Paged attention: parity with torch, and bits free of chunks, batches, block sizes, threads and hidden memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch

from kernels.attention import paged_attention, paged_attention_reference
from kernels.kv_codes import quantize_rows
from kernels.kv_order import PAIRED, PLAIN, best_order, to_paired, to_plain
from tandem.errors import InternalError

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]
CODES = [torch.int8, torch.float8_e4m3fn]
DTYPES = [torch.float32, torch.bfloat16, *CODES]
SHAPES = [(9, 3, 64), (2, 2, 40), (8, 1, 128)]
"""Heads, KV heads and head_dim."""


@dataclass(frozen=True)
class Sequence:
    """One sequence's queries, keys and values at positions 0..length-1, apart from any paging."""

    q: torch.Tensor  # [length, Hq, D]
    keys: torch.Tensor  # [length, Hkv, D]
    values: torch.Tensor


def make_sequence(length: int, heads: int, kv_heads: int, dim: int, generator: torch.Generator) -> Sequence:
    def rand(count: int) -> torch.Tensor:
        return torch.randn(length, count, dim, generator=generator)

    return Sequence(rand(heads), rand(kv_heads) * 2, rand(kv_heads))


def paged(
    sequences: list[Sequence], known: list[int], block_size: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Scatter the first `known` positions of each sequence over shuffled blocks; all other memory is NaN. The layer,
    block tables, and scales where the cache holds codes.
    """
    kv_heads, dim = sequences[0].keys.shape[1:]
    needed = [-(-count // block_size) for count in known]
    order = torch.randperm(sum(needed) + 3, generator=generator).int()
    shape = (len(order), 2, 2, kv_heads, block_size)
    cache = torch.full((*shape, dim), -128 if dtype is torch.int8 else torch.nan, dtype=dtype)
    scales = torch.full(shape, torch.nan) if dtype in CODES else None
    tables = torch.full((len(sequences), max([*needed, 1]) + 1), -1, dtype=torch.int32)
    first = 0
    for s, (sequence, count) in enumerate(zip(sequences, known, strict=True)):
        tables[s, : needed[s]] = order[first : first + needed[s]]
        first += needed[s]
        positions = torch.arange(count)
        blocks, offsets = tables[s][positions // block_size].long(), positions % block_size
        for part, rows in enumerate((sequence.keys[:count], sequence.values[:count])):
            if scales is None:
                cache[blocks, 1, part, :, offsets] = rows.to(dtype)
                continue
            codes, scales[blocks, 1, part, :, offsets] = quantize_rows(rows, dtype)
            cache.view(torch.uint8)[blocks, 1, part, :, offsets] = codes.view(torch.uint8)
    return cache[:, 1], tables, None if scales is None else scales[:, 1]


def attend(
    sequences: list[Sequence],
    spans: list[tuple[int, int]],
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
    generator: torch.Generator,
    function: Callable[..., torch.Tensor] = paged_attention,
) -> list[torch.Tensor]:
    """Run one step: sequence s has its queries at positions spans[s], and everything before in the cache."""
    kv_layer, tables, scales = paged(sequences, [end for _, end in spans], block_size, dtype, generator)
    q = torch.cat([seq.q[begin:end] for seq, (begin, end) in zip(sequences, spans, strict=True)])
    counts = [end - begin for begin, end in spans]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    contexts = torch.tensor([end for _, end in spans]).int()
    if function is paged_attention_reference:
        q = q.double()  # the reference must not have rounding errors of its own, which differ from CPU to CPU
    out = function(q, kv_layer, tables, starts, contexts, q.shape[2] ** -0.5, window, kv_scales=scales)
    return list(out.float().split(counts))


@pytest.mark.parametrize(
    ("dtype", "window"),
    [*product(DTYPES[:2], [None, 1, 50, 64]), *zip(CODES * 2, [None, 50, 64, 1], strict=True)],
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(9, 3, 64, 16), (4, 4, 40, 7), (8, 1, 128, 1), (2, 1, 256, 32), (6, 2, 8, 64), (3, 1, 96, 100)],
)
def test_matches_torch(
    implementation: str,
    dtype: torch.dtype,
    window: int | None,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    generator: torch.Generator,
) -> None:
    spans = [(0, 1), (63, 64), (64, 65), (0, 130), (37, 37), (99, 165), (150, 151), (126, 129)]
    sequences = [make_sequence(end, heads, kv_heads, dim, generator) for _, end in spans]
    state = generator.get_state()
    actual = attend(sequences, spans, block_size, dtype, window, generator)
    generator.set_state(state)
    expected = attend(sequences, spans, block_size, dtype, window, generator, paged_attention_reference)
    for one, other in zip(actual, expected, strict=True):
        # A score's rounding error grows with the length of its sum.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6 * max(1, dim / 64))


def test_empty_batches(implementation: str) -> None:
    cache = torch.zeros(2, 2, 1, 4, 8)
    zero, none = torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    empty = torch.zeros(0, 2, 8)
    assert paged_attention(empty, cache, torch.zeros((0, 3), dtype=torch.int32), zero, none, 1.0).shape == (0, 2, 8)
    two = torch.zeros(2, dtype=torch.int32)
    assert paged_attention(empty, cache, torch.zeros((1, 3), dtype=torch.int32), two, zero, 1.0).shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("dtype", "window", "heads", "kv_heads", "dim"),
    [
        *((*case, *shape) for case, shape in product(product(DTYPES[:2], [None, 70]), SHAPES)),
        (torch.int8, 70, *SHAPES[0]),
        (torch.float8_e4m3fn, None, *SHAPES[1]),
    ],
)
def test_bits_are_free_of_chunks_and_block_size(
    cpp: None,
    threads: int,
    dtype: torch.dtype,
    window: int | None,
    heads: int,
    kv_heads: int,
    dim: int,
    generator: torch.Generator,
    same_bits: SameBits,
) -> None:
    length = 215
    sequence = make_sequence(length, heads, kv_heads, dim, generator)
    torch.set_num_threads(1)
    expected = attend([sequence], [(0, length)], 16, dtype, window, generator)[0]
    torch.set_num_threads(threads)
    for block_size in (1, 7, 16, 32, 300):
        for chunk in (1, 7, 33, 64, 512):
            if chunk == 1 and block_size not in (7, 16):
                continue
            spans = [(begin, min(begin + chunk, length)) for begin in range(0, length, chunk)]
            parts = [attend([sequence], [span], block_size, dtype, window, generator)[0] for span in spans]
            assert same_bits(torch.cat(parts), expected), (block_size, chunk)


@pytest.mark.parametrize("window", [None, 40])
def test_bits_are_free_of_the_batch(
    cpp: None, threads: int, window: int | None, generator: torch.Generator, same_bits: SameBits
) -> None:
    spans = [(i * 7 % 190, i * 7 % 190 + (1 if i % 3 else 1 + i)) for i in range(64)]
    sequences = [make_sequence(end, 9, 3, 64, generator) for _, end in spans]
    torch.set_num_threads(1)
    alone = [
        attend([s], [span], 16, torch.float32, window, generator)[0] for s, span in zip(sequences, spans, strict=True)
    ]
    torch.set_num_threads(threads)
    for size in range(1, 65):
        first = size * 5 % (65 - size)
        picked = slice(first, first + size)
        together = attend(sequences[picked], spans[picked], 16, torch.float32, window, generator)
        assert all(same_bits(a, b) for a, b in zip(together, alone[picked], strict=True)), size


@pytest.mark.parametrize("dtype", [torch.float32, *CODES])
@pytest.mark.parametrize("rounded", [False, True])
def test_a_row_never_reads_what_it_must_not_see(
    cpp: None, dtype: torch.dtype, rounded: bool, generator: torch.Generator, same_bits: SameBits
) -> None:
    """Later keys and values of its own chunk that are not finite leave a row's bits alone."""
    function = functools.partial(paged_attention, rounded=rounded)
    sequence = make_sequence(100, 6, 2, 64, generator)
    expected = attend([sequence], [(0, 100)], 16, dtype, None, generator, function)[0]
    sequence.keys[57:] = torch.nan
    sequence.values[57:] = torch.inf
    actual = attend([sequence], [(0, 100)], 16, dtype, None, generator, function)[0]
    assert same_bits(actual[:57], expected[:57])
    assert bool(actual[57:].isnan().all())


def test_blocks_before_the_window_are_not_needed(implementation: str, generator: torch.Generator) -> None:
    sequence = make_sequence(100, 2, 1, 8, generator)
    kv_layer, tables, _ = paged([sequence], [100], 10, torch.float32, generator)
    starts, contexts = torch.tensor([0, 1]).int(), torch.tensor([100]).int()
    expected = paged_attention(sequence.q[99:], kv_layer, tables, starts, contexts, 0.3, 25)
    tables[0, :7] = -1
    assert torch.equal(paged_attention(sequence.q[99:], kv_layer, tables, starts, contexts, 0.3, 25), expected)
    tables[0, 7] = -1
    with pytest.raises(InternalError, match="sequence 0"):
        paged_attention(sequence.q[99:], kv_layer, tables, starts, contexts, 0.3, 25)


def test_large_scores_do_not_overflow(implementation: str, generator: torch.Generator) -> None:
    sequence = make_sequence(150, 2, 1, 16, generator)
    big = Sequence(sequence.q * 300, sequence.keys * 300, sequence.values)
    state = generator.get_state()
    actual = attend([big], [(0, 150)], 16, torch.float32, None, generator)[0]
    generator.set_state(state)
    expected = attend([big], [(0, 150)], 16, torch.float32, None, generator, paged_attention_reference)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)  # scores of 1e6: their own rounding is 0.1
    assert bool(actual.isfinite().all())


def test_wrong_arguments_are_named(implementation: str) -> None:
    def call(**changes: object) -> None:
        arguments: dict[str, object] = {
            "q": torch.zeros(2, 4, 8),
            "kv_layer": torch.zeros(5, 2, 2, 4, 8),
            "block_tables": torch.zeros((1, 3), dtype=torch.int32),
            "query_starts": torch.tensor([0, 2]).int(),
            "context_lens": torch.tensor([9]).int(),
            "scale": 1.0,
        }
        paged_attention(**{**arguments, **changes})  # type: ignore[arg-type]

    call()
    for name, value in (
        ("q", torch.zeros(2, 4, 16)[..., ::2]),
        ("q", torch.zeros(8, 4)),
        ("kv_layer", torch.zeros(5, 2, 4, 2, 8).transpose(2, 3)),
        ("kv_layer", torch.zeros(5, 2, 8)),
        ("block_tables", torch.zeros((2, 3), dtype=torch.int32)),
        ("block_tables", torch.zeros(3, dtype=torch.int32)),
        ("query_starts", torch.tensor([0, 2])),
        ("context_lens", torch.tensor([9.0])),
        ("out", torch.zeros(2, 4, 9)),
    ):
        with pytest.raises(InternalError, match="must be"):
            call(**{name: value})
    for name, value in (
        ("query_starts", torch.tensor([0, 1]).int()),
        ("query_starts", torch.tensor([1, 2]).int()),
        ("context_lens", torch.tensor([1]).int()),
        ("context_lens", torch.tensor([13]).int()),
        ("block_tables", torch.tensor([[0, 1, 5]]).int()),
        ("block_tables", torch.tensor([[0, -1, 1]]).int()),
    ):
        with pytest.raises(InternalError, match="do not fit together"):
            call(**{name: value})
    with pytest.raises(InternalError, match="query heads"):
        call(q=torch.zeros(2, 3, 8))
    with pytest.raises(InternalError, match="head_dim 12"):
        call(q=torch.zeros(2, 4, 12), kv_layer=torch.zeros(5, 2, 2, 4, 12))
    with pytest.raises(InternalError, match="sliding_window"):
        call(sliding_window=0)


def rounded_beside(
    other: Callable[..., torch.Tensor],
    shape: tuple[int, int, int],
    block_size: int,
    window: int | None,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rounded attention and `other` over the same cache, by sequence; `shape` is heads, KV heads and head_dim."""
    spans = [(0, 1), (63, 64), (0, 130), (37, 37), (99, 165), (150, 151)]
    sequences = [make_sequence(end, *shape, generator) for _, end in spans]
    state = generator.get_state()
    rounded = functools.partial(paged_attention, rounded=True)
    results = []
    for function in (rounded, other):
        generator.set_state(state)
        results.append(attend(sequences, spans, block_size, dtype, window, generator, function))
    return list(zip(*results, strict=True))


def in_paired_order(q: torch.Tensor, kv_layer: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
    """`paged_attention` over the same cache in paired order."""
    return paged_attention(q, to_paired(kv_layer), *rest, rounded=True, order=PAIRED, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"), [(9, 3, 64, 16), (8, 1, 128, 48), (2, 1, 256, 32), (3, 1, 96, 64)]
)
def test_paired_order_changes_no_bit(
    cpp: None,
    dtype: torch.dtype,
    window: int | None,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    generator: torch.Generator,
    same_bits: SameBits,
) -> None:
    """Whatever lies in the slots that nobody sees (NaN here)."""
    if best_order(dtype, block_size, dim) != PAIRED:
        pytest.skip("this CPU doesn't multiply pairs of bfloat16")
    pairs = rounded_beside(in_paired_order, (heads, kv_heads, dim), block_size, window, generator, dtype)
    assert all(same_bits(rounded, other) for rounded, other in pairs)


@pytest.mark.parametrize(("dtype", "block_size", "dim"), [(torch.float32, 16, 64), (torch.bfloat16, 8, 64)])
def test_paired_order_is_refused_where_it_can_not_be(dtype: torch.dtype, block_size: int, dim: int) -> None:
    assert best_order(dtype, block_size, dim) == PLAIN
    kv = torch.zeros(2, 2, 1, block_size, dim, dtype=dtype)
    one = torch.tensor([1], dtype=torch.int32)
    with pytest.raises(InternalError, match="paired"):
        paged_attention(
            torch.zeros(1, 1, dim), kv, one[None], torch.tensor([0, 1]).int(), one, 1.0, rounded=True, order=PAIRED
        )


def test_paired_order_and_back(generator: torch.Generator) -> None:
    plain = torch.randn(3, 2, 2, 5, 32, 8, generator=generator)
    paired = to_paired(plain)
    assert torch.equal(to_plain(paired), plain)
    keys, values = paired[1, 0, 0, 4].view(4, 32, 2), paired[1, 0, 1, 4].view(16, 8, 2)
    assert torch.equal(keys[:, 7].flatten(), plain[1, 0, 0, 4, 7])
    assert torch.equal(values[3, :, 1], plain[1, 0, 1, 4, 7])


@pytest.mark.parametrize(
    ("dtype", "window"), [*product([torch.bfloat16], [None, 1, 50]), *zip(CODES, [50, None], strict=True)]
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(9, 3, 64, 16), (8, 1, 128, 1), (2, 1, 256, 32), (6, 2, 96, 7), (4, 4, 32, 100), (3, 1, 40, 16)],
)
def test_rounded_is_near(
    implementation: str,
    dtype: torch.dtype,
    window: int | None,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    generator: torch.Generator,
) -> None:
    """Queries and weights in bf16: 8 bits, and a mean of values."""
    reference = paged_attention_reference
    pairs = rounded_beside(reference, (heads, kv_heads, dim), block_size, window, generator, dtype)
    for rounded, other in pairs:
        torch.testing.assert_close(rounded, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_rounded_bits_are_free_of_the_batch_and_of_chunks(
    cpp: None, dtype: torch.dtype, generator: torch.Generator, same_bits: SameBits
) -> None:
    sequences = [make_sequence(150, 9, 3, 64, generator) for _ in range(3)]
    rounded = functools.partial(paged_attention, rounded=True)
    (whole,) = attend(sequences[:1], [(0, 150)], 16, dtype, None, generator, rounded)
    for block_size, chunk in ((16, 1), (7, 64), (64, 33)):
        for begin in range(0, 150, chunk):
            span = (begin, min(150, begin + chunk))
            spans = [span, (149, 150), (3, 90)]
            part = attend(sequences, spans, block_size, dtype, None, generator, rounded)[0]
            assert same_bits(part, whole[slice(*span)])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("window", [None, 5])
def test_rounded_rows_never_take_what_they_must_not_see(
    cpp: None, dtype: torch.dtype, window: int | None, generator: torch.Generator, same_bits: SameBits
) -> None:
    """Values go in pairs of positions: the half of a pair that is hidden from a row may be anything."""
    rounded = functools.partial(paged_attention, rounded=True)
    sequence = make_sequence(40, 4, 2, 96, generator)

    def run(begin: int, end: int) -> torch.Tensor:
        return attend([sequence], [(begin, end)], 16, dtype, window, generator, rounded)[0]

    for bad in (20, 21):
        expected = run(0, bad)
        sequence.values[bad] = torch.inf
        together = run(0, 40)
        assert same_bits(together[:bad], expected)
        if window is not None:
            assert same_bits(together[bad + window :], run(bad + window, 40))
            assert bool(together[bad + window :].isfinite().all())
        sequence.values[bad] = 1.0


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", CODES)
def test_every_code_is_worth_what_torch_says(
    implementation: str, dtype: torch.dtype, rounded: bool, generator: torch.Generator
) -> None:
    """Of one position the output is its value: every number that 8 bits hold, in 64 dims of 4 heads."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    every = torch.where(every.float().isnan(), torch.zeros(()), every.float()).to(dtype)
    layer = torch.stack([every, every]).view(1, 2, 4, 1, 64)
    scales = torch.full((1, 2, 4, 1), 0.5)
    one, tables = torch.ones(1, dtype=torch.int32), torch.zeros((1, 1), dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    q = torch.randn(1, 4, 64, generator=generator)
    out = paged_attention(q, layer, tables, starts, one, 0.1, kv_scales=scales, rounded=rounded)
    assert torch.equal(out.flatten(), every.float() * 0.5)


def test_scales_that_do_not_fit_are_named(implementation: str) -> None:
    layer, one = torch.zeros(1, 2, 1, 16, 32, dtype=torch.int8), torch.ones(1, dtype=torch.int32)
    step = (torch.zeros(1, 1, 32), layer, one[None] - 1, torch.tensor([0, 1]).int(), one, 1.0)
    strided = torch.ones(1, 2, 1, 32)[..., ::2]
    for scales in (None, torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 16).double(), strided):
        with pytest.raises(InternalError, match="kv_scales of a cache"):
            paged_attention(*step, kv_scales=scales)
    with pytest.raises(InternalError, match="no scales"):
        paged_attention(step[0], layer.float(), *step[2:], kv_scales=torch.ones(1, 2, 1, 16))
