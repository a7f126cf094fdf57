"""A GPU's blocks on the host: what a prefill step writes goes there, what a transfer filled comes from there."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from gpu_stand_in import Memory, device, load

from engine.batch import Batch, SampleSpec, Slice
from engine.config import BY_FREE_MEMORY
from engine.device import mirror, pinning
from engine.device.device import Device
from engine.device.pinning import PinnedBlocks
from engine.loading import Engine
from tandem.record import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")
PROMPT = [5, 17, 3, 99, 200, 41, 8, 8, 150, 7, 12]
SPEC = SampleSpec(0, SamplingParams(temperature=0.0), 0, PROMPT)


def with_memory(path: Path) -> tuple[Engine, memoryview]:
    """An engine whose steps also write to the memory."""
    pools: list[memoryview] = []

    def factory(blocks: int, block_bytes: int) -> memoryview:
        pools.append(memoryview(bytearray(blocks * block_bytes)))
        return pools[0]

    return load(path, buffer_factory=factory), pools[0]


@pytest.mark.parametrize("piece_bytes", [1, 64 << 20])
def test_a_prompt_moves_from_one_engine_to_another(
    tiny_model: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks go by the hosts' memories, as transfers move them, and the next token is the same."""
    monkeypatch.setattr(pinning, "PIECE_BYTES", piece_bytes)
    sender, sent = with_memory(tiny_model)
    receiver = load(tiny_model)
    size = len(sent) // 32
    for start in (0, 4, 8):
        sender.runner.run(Batch([Slice("r", PROMPT[start : min(start + 4, 10)], start, [6, 1, 9])]))
    (want,) = sender.runner.run(Batch([Slice("r", PROMPT[10:], 10, [6, 1, 9], [SPEC])])).samples
    moved, view = [(6, 3), (1, 30), (9, 0)], receiver.kv_cache.blocks_view()
    for source, target in moved:
        view[target * size : (target + 1) * size] = sent[source * size : (source + 1) * size]
    arrived = [target for _, target in moved]
    batch = Batch([Slice("r", PROMPT[10:], 10, [3, 30, 0], [SPEC])], arrived=arrived)
    assert receiver.runner.run(batch).samples == [want]


def test_only_what_was_written_is_moved(tiny_model: Path) -> None:
    engine, memory = with_memory(tiny_model)
    engine.kv_cache.tensor.fill_(1.0)
    engine.runner.run(Batch([Slice("r", PROMPT[:5], 0, [6, 1])], [(7, 8)]))
    size = len(memory) // 32
    assert [b for b in range(32) if any(memory[b * size : (b + 1) * size])] == [1, 6, 8]
    assert bytes(memory[6 * size : 7 * size]) == engine.kv_cache.tensor[6].numpy().tobytes()


def test_an_engine_without_transfers_keeps_nothing_on_the_host(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(mirror.HostMirror, "start", lambda self, blocks: started.append(blocks))
    load(tiny_model).runner.run(Batch([Slice("r", PROMPT, 0, [6, 1, 9], [SPEC])]))
    assert started == []


def test_a_worker_takes_no_more_blocks_than_the_host_holds(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.loading.machine_memory", lambda: 4 * 20 * 2048)
    limits = {"num_blocks": BY_FREE_MEMORY, "max_context": 32, "graphs": False}
    alone = load(tiny_model, device(memory=Memory()), **limits)
    worker = load(tiny_model, device(memory=Memory()), transfers=True, **limits)
    assert alone.engine_config.num_blocks == 8 * 8
    assert worker.engine_config.num_blocks == 20
    assert worker.kv_cache.tensor[0].numel() * 4 == 2048


def test_memory_is_pinned_when_it_is_used_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of whole pages, which no copy goes across."""
    pinned: list[tuple[int, int]] = []
    monkeypatch.setattr(Device, "pin", lambda self, memory: not pinned.append((memory.data_ptr() - start, len(memory))))
    monkeypatch.setattr(pinning, "PIECE_BYTES", 1)
    blocks = torch.frombuffer(mmap.mmap(-1, 10 * 2048), dtype=torch.uint8).view(10, 2048)
    start, found = blocks.data_ptr(), PinnedBlocks(blocks, device())
    assert list(found.runs([0, 1, 2, 5, 9])) == [slice(0, 2), slice(2, 3), slice(5, 6), slice(9, 10)]
    assert pinned == [(0, 2), (2 * 2048, 2), (4 * 2048, 2), (8 * 2048, 2)]
    assert list(found.runs([3, 4])) == [slice(3, 4), slice(4, 5)]
    assert list(found.runs([])) == []
    assert len(pinned) == 4


def test_memory_that_cannot_be_pinned_is_copied_all_the_same(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(Device, "pin", lambda self, memory: bool(asked.append(memory)))
    monkeypatch.setattr(pinning, "PIECE_BYTES", 1)
    engine = load(tiny_model, transfers=True)
    view = engine.kv_cache.blocks_view()
    size = len(view) // 32
    view[3 * size : 4 * size] = view[30 * size : 31 * size] = bytes([7]) * size
    engine.runner.run(Batch([], arrived=[30, 3]))
    assert bytes(engine.kv_cache.blocks[3].numpy()) == bytes(engine.kv_cache.blocks[30].numpy()) == bytes([7]) * size
    assert len(asked) == 1
    assert "can't be pinned" in caplog.text
