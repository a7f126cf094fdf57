"""The fused step has the bits of the public operations called one by one, whatever the shape and the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from kernels.activation import silu_mul
from kernels.attention import paged_attention
from kernels.int8 import int8_linear, int8_rows, pack_int8, quantize_weight
from kernels.kv_codes import is_quantized
from kernels.kv_order import PAIRED, PLAIN, best_order, to_paired
from kernels.norm import rms_norm, rms_norm_heads
from kernels.rope import rope_and_store
from kernels.step import Step, StepLayer, StepLinear, StepShape, gate_up_order
from tandem.errors import InternalError

SameBits = Callable[[torch.Tensor, torch.Tensor], bool]
EPS = 1e-5
BLOCK_SIZE, BLOCKS, POSITIONS = 4, 64, 128


@dataclass
class Tiny:
    """A random model, and beside the fused step's weights gate and up as they were."""

    shape: StepShape
    layers: list[StepLayer]
    gate_up: list[StepLinear]
    norm: torch.Tensor
    head: StepLinear
    table: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor

    def step(self) -> Step:
        return Step(self.shape, self.layers, self.norm, self.head, self.table, self.cos, self.sin)


def make(shape: StepShape, generator: torch.Generator, *, bias: bool, qk_norm: bool, window: int | None) -> Tiny:
    def rand(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    def linear(n: int, k: int, order: torch.Tensor | None = None) -> tuple[StepLinear, StepLinear]:
        weight, b = quantize_weight(rand(n, k) * k**-0.5), rand(n) if bias else None
        moved = b if b is None or order is None else torch.empty(n).index_copy_(0, order, b)
        return StepLinear(pack_int8([weight], order), moved), StepLinear(pack_int8([weight]), b)

    layers, gates = [], []
    width = shape.heads * shape.head_dim
    for index in range(2):
        gate_up, plain = linear(2 * shape.inner, shape.hidden, gate_up_order(shape.inner))
        gates.append(plain)
        layers.append(
            StepLayer(
                input_norm=rand(shape.hidden),
                qkv=linear(width + 2 * shape.kv_heads * shape.head_dim, shape.hidden)[0],
                query_norm=rand(shape.head_dim) if qk_norm else None,
                key_norm=rand(shape.head_dim) if qk_norm else None,
                output=linear(shape.hidden, width)[0],
                post_norm=rand(shape.hidden),
                gate_up=gate_up,
                down=linear(shape.hidden, shape.inner)[0],
                window=window,
                fine_down=index == 0,
                kv_scales=(0.05, 0.03) if index else None,
            )
        )
    angles = torch.arange(POSITIONS)[:, None] * torch.rand(shape.head_dim // 2, generator=generator)
    head = StepLinear(pack_int8([quantize_weight(rand(shape.vocabulary, shape.hidden))]))
    table = rand(shape.vocabulary, shape.hidden).bfloat16() if bias else None
    return Tiny(shape, layers, gates, rand(shape.hidden), head, table, angles.cos(), angles.sin())


@dataclass
class Inputs:
    """One step: sequence s computes positions spans[s]; its blocks begin at s * 16."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    contexts: torch.Tensor
    rows: torch.Tensor


def inputs(
    spans: Sequence[tuple[int, int]], tokens: torch.Tensor, sequences: Sequence[int], block_size: int = BLOCK_SIZE
) -> Inputs:
    positions = torch.cat([torch.arange(a, b) for a, b in spans])
    owner = torch.cat([torch.full((b - a,), s) for s, (a, b) in zip(sequences, spans, strict=True)])
    starts = torch.tensor([0, *(b - a for a, b in spans)]).cumsum(0)
    return Inputs(
        tokens[owner, positions],
        positions,
        owner * 16 * block_size + positions,
        torch.stack([torch.arange(s * 16, s * 16 + 16) for s in sequences]).int(),
        starts.int(),
        torch.tensor([b for _, b in spans]).int(),
        starts[1:] - 1,
    )


def run(
    step: Step,
    i: Inputs,
    cache: torch.Tensor,
    order: str = PLAIN,
    greedy: torch.Tensor | None = None,
    best: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    where = (i.positions, i.slots, i.tables, i.starts, i.contexts)
    return step.run(i.ids, *where, cache, i.rows, order, greedy, best, scales)


def make_caches(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Two caches of zeros, with their scales where the dtype is one of codes."""
    quantized = is_quantized(dtype)
    caches = [torch.zeros(shape, dtype=dtype) for _ in range(2)]
    return caches, [torch.zeros(shape[:-1]) if quantized else None for _ in range(2)]


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    return cache.contiguous().view(torch.uint8)


def one_by_one(model: Tiny, i: Inputs, cache: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    shape = model.shape
    residual = int8_rows(model.head.packed, i.ids) if model.table is None else model.table[i.ids].float()

    def product(x: torch.Tensor, linear: StepLinear, *, fine: bool = False) -> torch.Tensor:
        return int8_linear(x, linear.packed, linear.bias, fine=fine)

    for index, layer in enumerate(model.layers):
        qkv = product(rms_norm(residual, layer.input_norm, EPS), layer.qkv)
        heads = qkv.view(len(qkv), -1, shape.head_dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = heads[:, : shape.heads], heads[:, shape.heads : shape.heads + shape.kv_heads]
            rms_norm_heads(query, layer.query_norm, EPS, out=query)
            rms_norm_heads(key, layer.key_norm, EPS, out=key)
        kv, kv_scales = cache[:, index], None if scales is None else scales[:, index]
        q = rope_and_store(
            qkv,
            i.positions,
            i.slots,
            model.cos,
            model.sin,
            kv,
            shape.heads,
            shape.kv_heads,
            interleaved=shape.interleaved_rope,
            kv_scales=kv_scales,
            fixed_scales=layer.kv_scales,
        )
        where = (i.tables, i.starts, i.contexts, shape.head_dim**-0.5, layer.window)
        mixed = paged_attention(q, kv, *where, kv_scales=kv_scales, rounded=True)
        residual = residual + product(mixed.view(len(qkv), -1), layer.output)
        gate_up = product(rms_norm(residual, layer.post_norm, EPS), model.gate_up[index])
        residual = residual + product(silu_mul(gate_up), layer.down, fine=layer.fine_down)
    return product(rms_norm(residual[i.rows].contiguous(), model.norm, EPS), model.head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "bias", "qk_norm", "window", "interleaved"),
    [
        (9, 3, 64, False, False, None, False),
        (4, 4, 32, True, False, 7, True),
        (8, 1, 16, False, True, None, False),
        (2, 1, 48, True, True, 1, False),
    ],
)
def test_has_the_bits_of_the_operations_one_by_one(
    cpp: None,
    threads: int,
    heads: int,
    kv_heads: int,
    dim: int,
    bias: bool,
    qk_norm: bool,
    window: int | None,
    interleaved: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
    same_bits: SameBits,
) -> None:
    shape = StepShape(96, 160, heads, kv_heads, dim, 101, EPS, interleaved)
    model = make(shape, generator, bias=bias, qk_norm=qk_norm, window=window)
    step = model.step()
    tokens = torch.randint(0, 101, (4, 64), generator=generator)
    caches, scales = make_caches((BLOCKS, 2, 2, kv_heads, BLOCK_SIZE, dim), dtype)
    for spans in ([(0, 1), (0, 33), (0, 5)], [(1, 2), (33, 34), (5, 21)], [(2, 3), (34, 35), (21, 22)]):
        batch = inputs(spans, tokens, [2, 0, 3])
        fused = run(step, batch, caches[0], scales=scales[0])
        assert same_bits(fused, one_by_one(model, batch, caches[1], scales[1]))
        assert torch.equal(as_bytes(caches[0]), as_bytes(caches[1]))
        assert scales[0] is None or torch.equal(scales[0], scales[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "block_size"),
    [(9, 3, 64, None, 16), (4, 4, 32, 7, 32), (2, 1, 96, 1, 16), (8, 1, 128, 40, 48)],
)
def test_a_cache_in_paired_order_gives_the_same_bits(
    cpp: None,
    dtype: torch.dtype,
    threads: int,
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    block_size: int,
    generator: torch.Generator,
    same_bits: SameBits,
) -> None:
    if best_order(dtype, block_size, dim) != PAIRED:
        pytest.skip("this CPU doesn't multiply pairs of bfloat16")
    shape = StepShape(96, 160, heads, kv_heads, dim, 101, EPS, False)
    step = make(shape, generator, bias=False, qk_norm=False, window=window).step()
    tokens = torch.randint(0, 101, (4, 128), generator=generator)
    caches, scales = make_caches((BLOCKS, 2, 2, kv_heads, block_size, dim), dtype)
    decoding = [(90, 91), (34, 35), (21, 22)]
    for spans in ([(0, 1), (0, 33), (0, 5)], [(1, 90), (33, 34), (5, 21)], decoding * 2):
        batch = inputs(spans, tokens, [2, 0, 3] * (len(spans) // 3), block_size)
        plain = run(step, batch, caches[0], scales=scales[0]).clone()
        assert same_bits(plain, run(step, batch, caches[1], PAIRED, scales=scales[1]))
        assert torch.equal(as_bytes(to_paired(caches[0])), as_bytes(caches[1]))
        assert scales[0] is None or torch.equal(scales[0], scales[1])


@pytest.mark.parametrize("vocabulary", [101, 512])
def test_greedy_rows_get_their_largest_logit(
    cpp: None, threads: int, vocabulary: int, generator: torch.Generator, same_bits: SameBits
) -> None:
    model = make(StepShape(64, 96, 4, 2, 16, vocabulary, EPS, False), generator, bias=True, qk_norm=False, window=None)
    # Every logit several times: the lowest id wins.
    weight = torch.randn(50, 64, generator=generator).repeat(11, 1)[:vocabulary].contiguous()
    bias = torch.randn(50, generator=generator).repeat(11)[:vocabulary].contiguous()
    model.head = StepLinear(pack_int8([quantize_weight(weight)]), bias)
    step = model.step()
    batch = inputs([(0, 20)], torch.randint(0, vocabulary, (4, 64), generator=generator), [1])
    batch.rows = torch.arange(20)
    caches = [torch.zeros(BLOCKS, 2, 2, 2, BLOCK_SIZE, 16) for _ in range(2)]
    expected = run(step, batch, caches[0]).clone()
    greedy = (torch.arange(20) % 3 > 0).to(torch.uint8)
    best = torch.full((20,), -7)
    logits = run(step, batch, caches[1], PLAIN, greedy, best)
    assert torch.equal(best[greedy == 1], expected.argmax(1)[greedy == 1])
    assert bool((best[greedy == 0] == -7).all())
    assert same_bits(logits[greedy == 0], expected[greedy == 0])
    assert int(best.max()) < 50


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_greedy_rows_that_are_not_finite_say_so(tiny: Tiny, bad: float, generator: torch.Generator) -> None:
    bias = torch.zeros(50)
    bias[17] = bad
    tiny.head = StepLinear(tiny.head.packed, bias)
    batch = inputs([(0, 3)], torch.randint(0, 50, (4, 64), generator=generator), [1])
    best = torch.zeros(1, dtype=torch.int64)
    cache = torch.zeros(BLOCKS, 2, 2, 2, BLOCK_SIZE, 16)
    run(tiny.step(), batch, cache, PLAIN, torch.ones(1, dtype=torch.uint8), best)
    assert (int(best) == -1) == (bad != -torch.inf)  # an id of -inf is one that can't be drawn, and no error
    tiny.head = StepLinear(tiny.head.packed, torch.full((50,), -torch.inf))
    run(tiny.step(), batch, cache, PLAIN, torch.ones(1, dtype=torch.uint8), best)
    assert int(best) == -1


def test_arguments_that_do_not_fit_are_refused(tiny: Tiny, generator: torch.Generator) -> None:
    batch = inputs([(0, 3)], torch.randint(0, 50, (4, 64), generator=generator), [1])
    cache = torch.zeros(BLOCKS, 2, 2, 2, BLOCK_SIZE, 16)
    step, greedy, best = tiny.step(), torch.ones(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    for order in (PAIRED, "another"):
        with pytest.raises(InternalError, match="order"):
            run(step, batch, cache, order)
    with pytest.raises(InternalError, match="go together"):
        run(step, batch, cache, PLAIN, greedy)
    for wrong in ((greedy.int(), best), (greedy, best.int()), (torch.ones(2, dtype=torch.uint8), best)):
        with pytest.raises(InternalError, match=r"greedy|best"):
            run(step, batch, cache, PLAIN, *wrong)
    assert not bool(cache.any())


@pytest.fixture
def tiny(cpp: None, generator: torch.Generator) -> Tiny:
    return make(StepShape(64, 96, 4, 2, 16, 50, EPS, False), generator, bias=False, qk_norm=False, window=None)


def test_a_row_has_the_same_bits_in_any_batch_and_chunk(
    tiny: Tiny, threads: int, generator: torch.Generator, same_bits: SameBits
) -> None:
    step, tokens = tiny.step(), torch.randint(0, 50, (4, 64), generator=generator)
    expected = None
    for chunk in (1, 3, 8, 40):
        for others in ([], [1], [0, 3]):
            cache = torch.zeros(BLOCKS, 2, 2, 2, BLOCK_SIZE, 16)
            for begin in range(0, 40, chunk):
                spans = [(begin, min(40, begin + chunk)), *((0, 7 + s) for s in others)]
                logits = run(step, inputs(spans, tokens, [2, *others]), cache)[0]
            expected = logits if expected is None else expected
            assert same_bits(logits, expected)


def test_rows_without_samples(tiny: Tiny, generator: torch.Generator) -> None:
    batch = inputs([(0, 9)], torch.randint(0, 50, (4, 64), generator=generator), [1])
    batch.rows = torch.zeros(0, dtype=torch.int64)
    assert run(tiny.step(), batch, torch.zeros(BLOCKS, 2, 2, 2, BLOCK_SIZE, 16)).shape == (0, 50)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ids", 50, "token id"),
        ("ids", -1, "token id"),
        ("positions", POSITIONS, "position"),
        ("slots", BLOCKS * BLOCK_SIZE, "slot"),
        ("rows", 9, "sampled row"),
        ("tables", BLOCKS, "sequence"),
        ("contexts", 3, "sequence"),
    ],
)
def test_what_is_out_of_range_changes_nothing(
    tiny: Tiny, field: str, value: int, message: str, generator: torch.Generator
) -> None:
    batch = inputs([(0, 9)], torch.randint(0, 50, (4, 64), generator=generator), [1])
    getattr(batch, field).view(-1)[0] = value
    cache = torch.zeros(BLOCKS, 2, 2, 2, BLOCK_SIZE, 16)
    with pytest.raises(InternalError, match=message):
        run(tiny.step(), batch, cache)
    assert not bool(cache.any())


@pytest.mark.parametrize(("hidden", "inner", "dim"), [(48, 96, 16), (64, 80, 16), (64, 96, 8), (64, 96, 264)])
def test_shapes_that_it_can_not_run(hidden: int, inner: int, dim: int) -> None:
    assert StepShape(hidden, inner, 4, 2, dim, 50, EPS, False).why_not() is not None
    with pytest.raises(InternalError, match=r"must be|most"):
        Step(StepShape(hidden, inner, 4, 2, dim, 50, EPS, False), [], *[None] * 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("heads", "kv_heads"), [(97, 1), (194, 2), (5, 2)])
def test_heads_that_it_can_not_run(heads: int, kv_heads: int) -> None:
    reason = StepShape(64, 96, heads, kv_heads, 32, 50, EPS, False).why_not()
    assert reason is not None
    assert "KV heads" in reason


def test_gate_up_order_is_a_permutation() -> None:
    order = gate_up_order(96)
    assert sorted(order.tolist()) == list(range(192))
