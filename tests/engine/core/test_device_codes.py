"""Keys and values of 8 bits on a GPU: the CPU's tokens and bytes, over copies, chunks, graphs and transfers."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from gpu_stand_in import Memory, device, load
from recording_graphs import RecordingGraphs

from engine.batch import Batch, SampledToken, SampleSpec, Slice
from engine.config import BY_FREE_MEMORY
from engine.loading import Engine
from engine.runner import Runner
from kernels.kv_codes import quantize_rows
from kv_transfer.conversion import convert
from kv_transfer.plan import plan_transfer
from tandem.record import SamplingParams
from worker.loading import layout_of

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")
CODES = ["int8", "float8_e4m3"]
INT8: dict[str, Any] = {"kv_dtype": "int8"}
GREEDY = SamplingParams(temperature=0.0)
PARAMS = [GREEDY, SamplingParams(temperature=1.1, seed=3, top_p=0.9)]
PROMPTS = [[5, 17, 3, 99, 200, 41, 8, 8, 150, 7, 12], [1, 2, 3]]
TABLES = [[6, 1, 9, 12], [3, 20, 2, 5]]
SPEC = SampleSpec(0, GREEDY, 0, PROMPTS[0], logprobs=0)


@pytest.fixture(params=["triton", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TANDEM_GPU_KERNELS", request.param)
    monkeypatch.setenv("TANDEM_ATTENTION", request.param)
    return str(request.param)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it doesn't matter what computes: the faster one here."""
    monkeypatch.setenv("TANDEM_GPU_KERNELS", "torch")
    monkeypatch.setenv("TANDEM_ATTENTION", "torch")


def generate(runner: Runner, count: int, chunk: int) -> list[list[SampledToken]]:
    """`count` tokens for both prompts, side by side in chunks, the short one decoding meanwhile."""
    done: list[list[SampledToken]] = [[] for _ in PROMPTS]
    computed = [0] * len(PROMPTS)
    while going := [s for s in range(len(PROMPTS)) if len(done[s]) < count]:
        slices = []
        for s in going:
            ids = [token.token_id for token in done[s]]
            known = [*PROMPTS[s], *ids]
            end = min(len(known), computed[s] + chunk)
            spec = SampleSpec(0, PARAMS[s], len(ids), PROMPTS[s], ids, logprobs=0)
            samples = [spec] if end == len(known) else []
            slices.append(Slice(f"s{s}", known[computed[s] : end], computed[s], TABLES[s], samples))
            computed[s] = end
        for s, drawn in zip(going, runner.run(Batch(slices)).samples, strict=True):
            done[s] += drawn
    return done


def ids_of(drawn: list[list[SampledToken]]) -> list[list[int]]:
    return [[token.token_id for token in tokens] for tokens in drawn]


@pytest.mark.parametrize("kv_dtype", CODES)
def test_tokens_and_blocks_are_those_of_the_cpu(
    make_engine: Callable[..., Engine], tiny_model: Path, kernels: str, kv_dtype: str
) -> None:
    """In other chunks, too. Sums in another order may bring a value to the next code, and no further."""
    cpu, gpu = make_engine(kv_dtype=kv_dtype), load(tiny_model, kv_dtype=kv_dtype)
    want, got = generate(cpu.runner, 4, 6), generate(gpu.runner, 4, 4)
    assert ids_of(got) == ids_of(want)
    for one, other in zip(chain(*got), chain(*want), strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=5e-3)
    assert gpu.kv_cache.blocks.shape == cpu.kv_cache.blocks.shape
    assert gpu.kv_cache.scales is not None
    assert cpu.kv_cache.scales is not None
    torch.testing.assert_close(gpu.kv_cache.scales, cpu.kv_cache.scales, rtol=1e-4, atol=0)
    mine, theirs = (engine.kv_cache.tensor.view(torch.int8).int() for engine in (gpu, cpu))
    assert int((mine - theirs).abs().max()) <= 1
    assert float((mine != theirs).float().mean()) < 1e-3
    assert int((theirs != 0).sum()) > 1000


@pytest.mark.parametrize("kv_dtype", CODES)
def test_a_copied_block_has_its_scales(tiny_model: Path, kv_dtype: str) -> None:
    """What follows a shared prefix is the same after the copy of its last block."""
    engine = load(tiny_model, kv_dtype=kv_dtype)
    engine.runner.run(Batch([Slice("r", PROMPTS[0][:10], 0, [0, 1, 2])]))
    want = engine.runner.run(Batch([Slice("r", PROMPTS[0][10:], 10, [0, 1, 2], [SPEC])])).samples
    last = Slice("r", PROMPTS[0][10:], 10, [0, 8, 7], [SPEC])
    assert engine.runner.run(Batch([last], [(2, 7), (1, 8)])).samples == want
    assert torch.equal(engine.kv_cache.blocks[8], engine.kv_cache.blocks[1])
    assert bool(engine.kv_cache.blocks[8].any())


@pytest.mark.parametrize("kv_dtype", CODES)
def test_replayed_steps_draw_what_eager_ones_do(
    tiny_model: Path, kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = generate(load(tiny_model, kv_dtype=kv_dtype, graphs=False).runner, 4, 11)
    graphs = RecordingGraphs(monkeypatch)
    engine = load(tiny_model, device(graphs), kv_dtype=kv_dtype, max_sequences=4)
    assert generate(engine.runner, 4, 11) == want
    assert (graphs.captures, graphs.replays) == (1, 3)


def test_float16_is_rounded_to_codes(tiny_model: Path) -> None:
    """Activations of 16 bits, as on a GPU; the interpreter can't have bfloat16."""
    wide, narrow = (load(tiny_model, dtype="float16", **kind) for kind in ({}, INT8))
    first = [generate(engine.runner, 1, 11)[0][0] for engine in (wide, narrow)]
    assert first[0].token_id == first[1].token_id
    assert first[0].logprobs != first[1].logprobs
    assert narrow.kv_cache.blocks.shape[1] < 0.7 * wide.kv_cache.blocks.shape[1]
    assert narrow.numerics_id == wide.numerics_id.replace("kv-float16", "kv-int8")


def test_the_checkpoints_scales_stand_in_the_blocks(tiny_model: Path, kernels: str, tmp_path: Path) -> None:
    folder = tmp_path / "scaled"
    shutil.copytree(tiny_model, folder)
    scales = {
        f"model.layers.{layer}.self_attn.{part}_scale": torch.tensor([0.01 * (layer + 1) + offset])
        for layer in range(2)
        for part, offset in (("k", 0.0), ("v", 0.005))
    }
    tensors = {**load_file(tiny_model / "model.safetensors"), **scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    engine = load(folder, kv_dtype="float8_e4m3")
    engine.runner.run(Batch([Slice("r", PROMPTS[0][:4], 0, [6], [])]))
    assert engine.kv_cache.scales is not None
    written = engine.kv_cache.scales[6].flatten(2)  # [layers, 2, heads * block_size]
    assert torch.equal(written, torch.tensor(list(scales.values())).view(2, 2, 1).expand_as(written))
    other = load(folder, kv_dtype="int8")
    other.runner.run(Batch([Slice("r", PROMPTS[0][:4], 0, [6], [])]))
    assert other.kv_cache.scales is not None
    assert len(other.kv_cache.scales[6].unique()) > 4


def sent_by(path: Path, **settings: Any) -> tuple[Engine, memoryview, list[SampledToken]]:
    """A prefill engine, the memory that transfers read, and the first token, drawn in a step of one row."""
    pools: list[memoryview] = []

    def factory(blocks: int, block_bytes: int) -> memoryview:
        pools.append(memoryview(bytearray(blocks * block_bytes)))
        return pools[0]

    engine = load(path, buffer_factory=factory, **settings)
    engine.runner.run(Batch([Slice("r", PROMPTS[0][:10], 0, TABLES[0])]))
    (first,) = engine.runner.run(Batch([Slice("r", PROMPTS[0][10:], 10, TABLES[0], [SPEC])])).samples
    return engine, pools[0], first


@pytest.mark.parametrize("kv_dtype", CODES)
@pytest.mark.usefixtures("by_torch")
def test_blocks_go_from_one_engine_to_another_with_their_scales(tiny_model: Path, kv_dtype: str) -> None:
    sender, sent, want = sent_by(tiny_model, kv_dtype=kv_dtype)
    receiver = load(tiny_model, kv_dtype=kv_dtype)
    receiver.kv_cache.blocks_view()[:] = sent
    last = Slice("r", PROMPTS[0][10:], 10, TABLES[0], [SPEC])
    assert receiver.runner.run(Batch([last], arrived=TABLES[0][:3])).samples == [want]
    assert torch.equal(receiver.kv_cache.blocks[TABLES[0][:3]], sender.kv_cache.blocks[TABLES[0][:3]])


@pytest.mark.parametrize("kv_dtype", CODES)
@pytest.mark.usefixtures("by_torch")
def test_a_wide_pool_is_rounded_on_its_way(tiny_model: Path, kv_dtype: str) -> None:
    """By the host, to the codes that the rule gives; decode goes on from them."""
    sender, sent, first = sent_by(tiny_model, dtype="float16", block_size=8)
    receiver = load(tiny_model, dtype="float16", kv_dtype=kv_dtype)
    plan, pool = plan_transfer(layout_of(sender), layout_of(receiver)), receiver.kv_cache.blocks_view()
    (piece,) = plan.pieces(0, 8, 1 << 20)
    staged = sent[TABLES[0][0] * plan.source.block_bytes :][: plan.source.block_bytes]
    convert(plan, piece, plan.heads[0][0], staged, pool, [30, 4])
    rest = Slice("r", PROMPTS[0][8:], 8, [30, 4, 11], [SPEC])
    (drawn,) = receiver.runner.run(Batch([rest], arrived=[30, 4])).samples
    assert ids_of([drawn]) == ids_of([first])
    for place, block in enumerate((30, 4)):
        values = sender.kv_cache.tensor[TABLES[0][0], :, :, :, 4 * place : 4 * place + 4].float()
        codes, scales = quantize_rows(values, receiver.kv_cache.tensor.dtype)
        assert receiver.kv_cache.scales is not None
        assert torch.equal(receiver.kv_cache.tensor[block].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(receiver.kv_cache.scales[block], scales)


@pytest.mark.usefixtures("by_torch")
def test_more_blocks_fit(tiny_model: Path) -> None:
    """Counted by what they take with their scales: (16 + 4) / (4 * 16) of float32 in heads of 16."""
    limits: dict[str, Any] = {
        "num_blocks": BY_FREE_MEMORY,
        "max_context": 32,
        "max_sequences": 100,
        "max_step_tokens": 40,
    }
    memory = Memory(total_bytes=1_000_000, free_bytes=500_000, peak_bytes=100_000)
    wide, narrow = (load(tiny_model, device(memory=memory), graphs=False, **limits, **k) for k in ({}, INT8))
    room = 500_000 - 100_000 - 30_000
    block = narrow.kv_cache.blocks.shape[1]
    assert block / wide.kv_cache.blocks.shape[1] == (16 + 4) / (4 * 16)
    assert narrow.kv_cache.blocks.nbytes <= room < narrow.kv_cache.blocks.nbytes + block
    assert len(narrow.kv_cache.blocks_view()) == narrow.kv_cache.blocks.nbytes
