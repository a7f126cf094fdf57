"""The runner and the whole engine on a tiny model: same bits however the work is cut, and nothing wrong goes unsaid."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Batch, SampledToken, SampleSpec, Slice, StepOutput
from engine.kv_cache import KVCache, kv_bytes
from engine.loading import Engine
from engine.runner import Runner, build_meta
from kernels import dispatch
from tandem.errors import ConfigError, InternalError
from tandem.record import SamplingParams

MakeEngine = Callable[..., Engine]
PROMPT = [5, 17, 3, 99, 200, 41, 8, 8, 150, 7, 12]
SAMPLED = SamplingParams(temperature=1.1, top_p=0.95, seed=12, repetition_penalty=1.1)


def spec(output: Sequence[int] = (), index: int = 0, params: SamplingParams = SAMPLED) -> SampleSpec:
    """Asks for log probabilities, so that equal answers mean equal logits to the last bits that float32 shows."""
    return SampleSpec(index, params, len(output), PROMPT, list(output), logprobs=5)


def generate(runner: Runner, table: list[int], chunk: int, count: int = 6) -> list[SampledToken]:
    """Prefill in chunks, then decode."""
    done: list[SampledToken] = []
    for start in range(0, len(PROMPT), chunk):
        part = PROMPT[start : start + chunk]
        last = start + chunk >= len(PROMPT)
        output = runner.run(Batch([Slice("r", part, start, table, [spec()] if last else [])]))
        assert output.errors == {}
        done += output.samples[0]
    while len(done) < count:
        ids = [item.token_id for item in done]
        position = len(PROMPT) + len(ids) - 1
        done += runner.run(Batch([Slice("r", ids[-1:], position, table, [spec(ids)])])).samples[0]
    return done


@pytest.fixture
def cpp() -> object:
    with dispatch.forced("cpp") as chosen:
        yield chosen


@pytest.mark.usefixtures("cpp")
def test_chunks_blocks_and_block_sizes_change_nothing(make_engine: MakeEngine) -> None:
    runner = make_engine().runner
    want = generate(runner, [0, 1, 2, 3, 4], len(PROMPT))
    assert len({item.token_id for item in want}) > 1
    for chunk in (1, 2, 7):
        assert generate(runner, [9, 30, 4, 17, 11], chunk) == want
    assert generate(make_engine(block_size=16).runner, [7, 2], 3) == want
    assert generate(make_engine(block_size=1, num_blocks=40).runner, list(range(39, 0, -1)), 3) == want


@pytest.mark.usefixtures("cpp")
def test_company_changes_nothing(make_engine: MakeEngine) -> None:
    runner = make_engine().runner
    want = generate(runner, [0, 1, 2, 3, 4], 4)
    runner.run(Batch([Slice("r", PROMPT[:8], 0, [20, 21, 22, 23])]))
    company = [Slice(f"c{i}", [i + 1] * (i + 1), 0, [5 + i], [spec()] * (i % 2)) for i in range(4)]
    mine = Slice("r", PROMPT[8:], 8, [20, 21, 22, 23], [spec()])
    output = runner.run(Batch([*company[:2], mine, *company[2:]]))
    assert output.samples[2] == want[:1]
    assert [len(samples) for samples in output.samples] == [0, 1, 1, 0, 1]


@pytest.mark.usefixtures("cpp")
def test_several_outputs_of_one_row(make_engine: MakeEngine) -> None:
    runner = make_engine().runner
    specs = [spec(index=index, params=SamplingParams(temperature=3.0, seed=1)) for index in range(4)]
    (together,) = runner.run(Batch([Slice("r", PROMPT, 0, [0, 1, 2], specs)])).samples
    assert len({item.token_id for item in together}) > 1
    for one, expected in zip(specs, together, strict=True):
        assert runner.run(Batch([Slice("r", PROMPT, 0, [4, 5, 6], [one])])).samples == [[expected]]


@pytest.mark.usefixtures("cpp")
def test_copies_come_first_in_order(make_engine: MakeEngine) -> None:
    runner = make_engine().runner
    want = generate(runner, [0, 1, 2, 3, 4], 11, count=2)
    runner.run(Batch([Slice("r", PROMPT[:10], 0, [0, 1, 2])]))
    # Block 2 goes to 8 by way of 7, which block 1 overwrites afterwards.
    copies = [(2, 7), (7, 8), (1, 7)]
    output = runner.run(Batch([Slice("r", PROMPT[10:], 10, [0, 7, 8], [spec()])], copies))
    assert output.samples[0] == want[:1]
    assert runner.run(Batch([], [(0, 1)])) == StepOutput([])


def test_a_sequence_with_broken_kv_fails_alone(make_engine: MakeEngine) -> None:
    engine = make_engine()
    slices = [Slice(f"s{i}", [9], 4, [2 * i, 2 * i + 1], [spec(), spec(index=1)]) for i in range(3)]
    for item in slices:
        engine.runner.run(Batch([Slice(item.request_id, [1, 2, 3, 4], 0, item.block_table)]))
    sound = engine.runner.run(Batch(slices))
    engine.kv_cache.tensor[2] = float("nan")
    output = engine.runner.run(Batch(slices))
    assert [len(samples) for samples in output.samples] == [2, 0, 2]
    assert list(output.errors) == [1]
    assert isinstance(output.errors[1], InternalError)
    assert "s1" in str(output.errors[1])
    assert (output.samples[0], output.samples[2]) == (sound.samples[0], sound.samples[2])


@pytest.mark.parametrize(
    "bad",
    [
        Slice("r", [], 0, [0]),
        Slice("r", [1], -1, [0]),
        Slice("r", [1], 4, [0]),
        Slice("r", [1] * 5, 0, [0]),
        Slice("r", [1], 0, []),
        Slice("r", [1], 0, [32]),
        Slice("r", [1], 0, [-1]),
        Slice("r", [1], 4, [32, 0]),
        Slice("r", [211], 0, [0]),
        Slice("r", [-1], 0, [0]),
        Slice("r", [1], 256, list(range(32)) * 3),
    ],
)
def test_a_wrong_batch_is_an_internal_error(make_engine: MakeEngine, bad: Slice) -> None:
    with pytest.raises(InternalError):
        make_engine().runner.run(Batch([Slice("ok", [1], 0, [3]), bad]))


@pytest.mark.parametrize("copy", [(0, 32), (32, 0), (-1, 0)])
def test_a_wrong_copy_is_an_internal_error(make_engine: MakeEngine, copy: tuple[int, int]) -> None:
    with pytest.raises(InternalError):
        make_engine().runner.run(Batch([], [copy]))


@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_warm_up(make_engine: MakeEngine, block_size: int) -> None:
    make_engine(block_size=block_size, num_blocks=4).runner.warm_up()


@st.composite
def slices_of(draw: st.DrawFn) -> tuple[list[Slice], int]:
    """Any valid slices and their block size."""
    size = draw(st.integers(1, 5))
    slices = []
    for number in range(draw(st.integers(1, 6))):
        start, count = draw(st.integers(0, 20)), draw(st.integers(1, 9))
        needed = -(-(start + count) // size)
        table = draw(st.lists(st.integers(0, 999), min_size=needed, max_size=needed + 2))
        slices.append(
            Slice(str(number), draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)), start, table)
        )
    return slices, size


@given(slices_of())
def test_build_meta_places_every_row(case: tuple[list[Slice], int]) -> None:
    slices, size = case
    ids, meta = build_meta(slices, size)
    rows = [(part, i) for part in slices for i in range(len(part.token_ids))]
    assert ids.tolist() == [part.token_ids[i] for part, i in rows]
    assert meta.positions.tolist() == [part.start + i for part, i in rows]
    assert meta.slots.tolist() == [
        part.block_table[(part.start + i) // size] * size + (part.start + i) % size for part, i in rows
    ]
    assert meta.query_starts.tolist() == np.cumsum([0, *(len(part.token_ids) for part in slices)]).tolist()
    assert meta.context_lens.tolist() == [part.end for part in slices]
    for row, part in enumerate(slices):
        assert meta.block_tables[row, : -(-part.end // size)].tolist() == part.block_table[: -(-part.end // size)]
    assert (ids.dtype, meta.positions.dtype, meta.slots.dtype) == (torch.int64,) * 3
    assert (meta.block_tables.dtype, meta.query_starts.dtype, meta.context_lens.dtype) == (torch.int32,) * 3


@pytest.mark.parametrize("kv_dtype", ["float32", "int8", "float8_e4m3"])
def test_a_copied_block_has_its_scales(make_engine: MakeEngine, implementation: str, kv_dtype: str) -> None:
    """What follows a shared block is the same after the block's copy."""
    engine = make_engine(kv_dtype=kv_dtype, block_size=4, num_blocks=4)
    engine.runner.run(Batch([Slice("r", PROMPT[:7], 0, [0, 1])]))
    steps: list[tuple[list[int], list[tuple[int, int]]]] = [([0, 1], []), ([0, 2], [(1, 2)]), ([3, 2], [(0, 3)])]
    outputs = []
    for table, copies in steps:
        outputs.append(engine.runner.run(Batch([Slice("r", [11], 7, table, [spec()])], copies)).samples)
    assert outputs[0] == outputs[1] == outputs[2]
    assert torch.equal(engine.kv_cache.blocks[2], engine.kv_cache.blocks[1])


def test_engine_says_what_it_is(make_engine: MakeEngine) -> None:
    one, two = make_engine(), make_engine(num_blocks=3, block_size=8)
    assert one.model_id == two.model_id
    assert len(one.model_id) == 64
    assert one.numerics_id == two.numerics_id
    others = [make_engine(kv_dtype=kv_dtype) for kv_dtype in ("bfloat16", "int8", "float8_e4m3")]
    assert len({engine.numerics_id for engine in (one, *others)}) == 4
    assert one.model_config.vocab_size == 211


def test_exact_without_exact_kernels_is_said(make_engine: MakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    with dispatch.forced("cpp"):
        make_engine()
    assert not caplog.records
    with dispatch.forced("torch"):
        make_engine(compute="bf16", dtype="bfloat16")
        assert not caplog.records
        make_engine()
    (record,) = caplog.records
    assert (record.levelname, record.name) == ("WARNING", "engine")
    assert "compute exact can't keep its promise with the torch kernels" in record.getMessage()


def test_cache_lies_in_the_callers_memory(make_engine: MakeEngine) -> None:
    asked: list[tuple[int, int]] = []
    memory = bytearray()

    def factory(num_blocks: int, block_bytes: int) -> memoryview:
        asked.append((num_blocks, block_bytes))
        memory.extend(bytes(num_blocks * block_bytes))
        return memoryview(memory)

    engine = make_engine(num_blocks=6, buffer_factory=factory)
    block_bytes, total = kv_bytes(engine.model_config, engine.engine_config)
    assert asked == [(6, block_bytes)]
    assert total == 6 * block_bytes == 6 * 4 * (2 * 2 * 2 * 16) * 4
    engine.runner.run(Batch([Slice("r", [1, 2], 0, [4])]))
    view = engine.kv_cache.blocks_view()
    assert len(view) == total
    touched = [b for b in range(6) if any(memory[b * block_bytes : (b + 1) * block_bytes])]
    assert touched == [4]
    assert bytes(view[4 * block_bytes : 5 * block_bytes]) == engine.kv_cache.tensor[4].numpy().tobytes()
    view[:4] = np.float32(2.5).tobytes()
    assert engine.kv_cache.layer(0)[0, 0, 0, 0, 0] == 2.5


def test_cache_of_the_wrong_size(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match="doesn't fit a buffer of 8 bytes"):
        make_engine(buffer_factory=lambda blocks, size: memoryview(bytearray(8)))


def test_cache_that_no_machine_holds(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match="can't reserve"):
        make_engine(num_blocks=1 << 40)


def test_cache_takes_memory_only_where_written(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=200_000)  # about 400 MB

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    cache = KVCache(engine.model_config, engine.engine_config)
    assert cache.tensor.nbytes > 300e6
    cache.tensor[100_000] = 1.0
    assert resident() - before < 30e6
