"""Ranks on GPUs, in whose place are threads with torch on the CPU: one rank's tokens, also ahead and over the host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")
from gpu_stand_in import Memory, device, load
from greedy_steps import GREEDY, greedy
from thread_ranks import Meeting, ThreadRanks

from engine.batch import Batch, SampleSpec, Slice
from engine.config import BY_FREE_MEMORY, EngineConfig
from engine.device.steps import DeviceSteps
from engine.loading import Engine
from engine.parallel.checkpoint import RankCheckpoint
from engine.parallel.loading import load_rank_on_device
from engine.runner import Runner
from engine.weights import open_checkpoint
from kernels.triton.launch import Launch
from tandem.record import SamplingParams

SIZE = 2
PROMPTS = [[5, 17, 3, 99, 200, 41, 8, 8, 150, 7, 12], [1, 2, 3], [77] * 9]
PENALISED = SamplingParams(temperature=0.9, seed=5, repetition_penalty=1.3, presence_penalty=0.2)
Sizes = dict[str, Any]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_GPU_KERNELS", "torch")
    monkeypatch.setenv("TANDEM_ATTENTION", "torch")


@contextmanager
def two_ranks(
    path: Path,
    factories: list[Callable[[int, int], memoryview]] | None = None,
    backends: Sequence[Any] = (None, None),
    **settings: Any,
) -> Iterator[list[Engine]]:
    """Both engines; the second follows meanwhile. `backends`: of each one's graphs."""
    sizes = {"num_blocks": 32, "block_size": 4, "max_sequences": 8, "max_step_tokens": 64, **settings}
    config = EngineConfig(str(path), device="cuda", compute="native", **sizes)
    meeting, whole = Meeting(SIZE), open_checkpoint(path)
    ranks = [ThreadRanks(rank, meeting) for rank in range(SIZE)]

    def load_one(rank: int) -> Engine:
        part, factory = RankCheckpoint(whole, rank, SIZE), factories[rank] if factories else None
        mirror: Sizes = {"transfers": True, "mirrored": factory is not None}
        own = device(backends[rank], Memory())
        return load_rank_on_device(part, config, ranks[rank], own, whole, factory, **mirror)

    with ThreadPoolExecutor(SIZE) as pool:
        engines = list(pool.map(load_one, range(SIZE)))
    whole.close()
    assert engines[0].follow is None
    assert engines[1].follow is not None
    following = threading.Thread(target=engines[1].follow)
    following.start()
    try:
        yield engines
    finally:
        ranks[0].close()
        following.join(60)
        assert not following.is_alive()
        ranks[1].close()


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_tokens_are_those_of_one_rank(tiny_model: Path, kv_dtype: str) -> None:
    want = greedy(load(tiny_model, kv_dtype=kv_dtype), PROMPTS, 6, 4)
    with two_ranks(tiny_model, kv_dtype=kv_dtype) as (leader, other):
        got = greedy(leader, PROMPTS, 6, 4)
        assert leader.kv_cache.tensor.shape[3] == other.kv_cache.tensor.shape[3] == 1
    assert [one.tokens for one in got] == [one.tokens for one in want]
    assert [one.logprobs for one in got] == [pytest.approx(one.logprobs, abs=1e-3) for one in want]


def draw_several(runner: Runner) -> list[int]:
    """Draws that edit their logits get rows of their own; then a copied block goes on."""
    specs = [SampleSpec(i, PENALISED, 0, PROMPTS[0], (), (i,)) for i in range(3)]
    other = Slice("t", PROMPTS[1], 0, [9], [SampleSpec(0, GREEDY, 0, PROMPTS[1])])
    first = runner.run(Batch([Slice("s", PROMPTS[0], 0, [0, 1, 2], specs), other]))
    runner.run(Batch([], [(9, 7)]))
    second = runner.run(Batch([Slice("t", [8], 3, [7], [SampleSpec(0, GREEDY, 0)])]))
    return [token.token_id for drawn in (*first.samples, *second.samples) for token in drawn]


def test_draws_and_copies_are_those_of_one_rank(tiny_model: Path) -> None:
    want = draw_several(load(tiny_model).runner)
    with two_ranks(tiny_model) as (leader, _):
        assert draw_several(leader.runner) == want
    assert len(want) == 5


def draw_ahead(runner: Runner) -> list[int]:
    """Each step is launched before the last one is collected, and takes its token on the device."""
    tokens, prompt = [], PROMPTS[1]
    running = runner.launch(Batch([Slice("r", prompt, 0, [3, 2, 1], [SampleSpec(0, GREEDY, 0)])]))
    for place in range(5):
        part = Slice("r", [0], len(prompt) + place, [3, 2, 1], [SampleSpec(0, GREEDY, place + 1)], follows=0)
        launched = runner.launch(Batch([part]))
        tokens.append(running.collect().samples[0][0].token_id)
        running = launched
    return [*tokens, running.collect().samples[0][0].token_id]


def test_steps_ahead_take_their_tokens_on_every_device(tiny_model: Path) -> None:
    want = draw_ahead(load(tiny_model).runner)
    with two_ranks(tiny_model) as (leader, _):
        assert draw_ahead(leader.runner) == want
    assert len(set(want)) > 1


class Replays:
    """A `GraphBackend`: what was captured is done again."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def capture(self, body: Callable[[], None]) -> Any:
        self.captured += 1
        body()
        body()
        return SimpleNamespace(replay=lambda: self._again(body))

    def _again(self, body: Callable[[], None]) -> None:
        self.replayed += 1
        body()

    def held_bytes(self) -> int:
        return 0


def test_captured_steps_are_those_of_one_rank(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks capture the same graphs, at warm-up and later, and replay the same ones."""
    lock, run = threading.Lock(), Launch.run

    def one_at_a_time(launch: Launch) -> None:  # Triton's interpreter has one state for all threads
        with lock:
            run(launch)

    monkeypatch.setattr(Launch, "run", one_at_a_time)
    monkeypatch.setenv("TANDEM_GPU_KERNELS", "triton")
    monkeypatch.setenv("TANDEM_ATTENTION", "triton")
    want = draw_ahead(load(tiny_model).runner)
    backends = [Replays(), Replays()]
    with two_ranks(tiny_model, backends=backends, max_sequences=4) as engines:
        engines[0].runner.warm_up()
        assert draw_ahead(engines[0].runner) == want
        steps = [engine.runner._steps for engine in engines]
        held = [len(one.graphs) for one in steps if isinstance(one, DeviceSteps) and one.graphs is not None]
        assert held == [3, 3]
    assert [backend.captured for backend in backends] == [3, 3]
    assert [len(one.graphs) for one in steps if isinstance(one, DeviceSteps) and one.graphs is not None] == [0, 0]
    assert backends[0].replayed == backends[1].replayed >= 5


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_every_ranks_blocks_go_by_the_host(tiny_model: Path, kv_dtype: str) -> None:
    """A prefill worker's ranks write theirs to their memories; a decode worker's bring what arrived there."""
    sent = [memoryview(bytearray()), memoryview(bytearray())]

    def factory(rank: int) -> Callable[[int, int], memoryview]:
        def make(blocks: int, block_bytes: int) -> memoryview:
            sent[rank] = memoryview(bytearray(blocks * block_bytes))
            return sent[rank]

        return make

    prompt, spec = PROMPTS[0], SampleSpec(0, GREEDY, 0)
    last = Slice("r", prompt[10:], 10, [6, 1, 9], [spec])
    kind, factories = {"kv_dtype": kv_dtype}, [factory(0), factory(1)]
    with two_ranks(tiny_model, factories, **kind) as (leader, _), two_ranks(tiny_model, **kind) as receivers:
        leader.runner.run(Batch([Slice("r", prompt[:10], 0, [6, 1, 9])]))
        for engine, memory in zip(receivers, sent, strict=True):
            assert any(memory)
            engine.kv_cache.blocks_view()[:] = memory
        want = leader.runner.run(Batch([last])).samples
        got = receivers[0].runner.run(Batch([last], arrived=[6, 1, 9])).samples
    assert got == want


def test_all_ranks_have_as_many_blocks_as_the_one_that_has_least(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.parallel.loading.machine_memory", lambda: SIZE * 4 * 20 * 1024)
    with two_ranks(tiny_model, num_blocks=BY_FREE_MEMORY, max_context=32, graphs=False) as engines:
        assert [engine.engine_config.num_blocks for engine in engines] == [20, 20]
