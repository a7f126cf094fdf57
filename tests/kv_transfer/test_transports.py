"""The contract that every transport passes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from kv_transfer import copying, nixl_copy
from kv_transfer.messages import Offer
from kv_transfer.pool import LocalPool
from kv_transfer.registry import source_transport, target_transport
from tandem.errors import DataCorruptionError, IncompatibleError, InternalError, InvalidRequestError, StaleError


def offer_of(ends: Any, blocks: list[int]) -> Offer:
    payload, checksums = ends.source.offer_payload(blocks)
    generations = tuple(ends.source_pool.generations[block] for block in blocks)
    return Offer(0, 0, 4 * len(blocks), tuple(blocks), generations, payload, checksums)


def connect(ends: Any) -> Any:
    return ends.target.connect(ends.source.endpoint(), "source-1", ends.sender.layout)


def test_blocks_arrive_where_they_should_and_nowhere_else(ends: Any, tools: Any) -> None:
    sent = [tools.fill(ends.source_pool, block, block) for block in (3, 1, 8)]
    view = connect(ends)
    offer = offer_of(ends, [3, 1, 8])
    view.copy(offer, ends.target_pool, [7, 2, 3])
    view.verify(offer)
    view.close()
    assert [tools.read(ends.target_pool, block) for block in (7, 2, 3)] == sent
    rest = [tools.read(ends.target_pool, b) for b in range(tools.NUM_BLOCKS) if b not in (7, 2, 3)]
    assert set(rest) == {bytes(ends.target_pool.block_bytes)}


def test_a_stopped_copy_raises_and_goes_no_further(ends: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (copying, nixl_copy):
        monkeypatch.setattr(module, "PIECE_BYTES", 1)
    sent = [tools.fill(ends.source_pool, block, block) for block in (0, 1)]
    asked = iter([False, True])
    with pytest.raises(StaleError):
        connect(ends).copy(offer_of(ends, [0, 1]), ends.target_pool, [4, 5], lambda: next(asked))
    assert tools.read(ends.target_pool, 4) == sent[0]
    assert tools.read(ends.target_pool, 5) == bytes(ends.target_pool.block_bytes)


def test_a_closed_view_copies_nothing(ends: Any) -> None:
    view = connect(ends)
    offer = offer_of(ends, [0])
    view.close()
    view.close()
    with pytest.raises(StaleError):
        view.copy(offer, ends.target_pool, [0])
    with pytest.raises(StaleError):
        view.verify(offer)


def test_views_are_independent(ends: Any, tools: Any) -> None:
    sent = tools.fill(ends.source_pool, 0, 5)
    first, second = connect(ends), connect(ends)
    first.close()
    second.copy(offer_of(ends, [0]), ends.target_pool, [1])
    assert tools.read(ends.target_pool, 1) == sent


@pytest.mark.parametrize("endpoint", [b"x", b"\x00" * 16, b"tandem-shm-2:" + b"g" * 96, b"\xff" * 1000])
def test_malformed_endpoints(ends: Any, endpoint: bytes) -> None:
    if ends.target.name == "memory" and len(endpoint) == 16:
        endpoint += b"y"
    with pytest.raises(InvalidRequestError) as caught:
        ends.target.connect(endpoint, "source-1", ends.sender.layout)
    assert caught.value.field == "open.endpoint"


def test_wrong_target_blocks_are_our_own_bug(ends: Any) -> None:
    view = connect(ends)
    for target, blocks in ((ends.target_pool, [32]), (ends.target_pool, [-1]), (LocalPool(4, 8), [0])):
        with pytest.raises(InternalError):
            view.copy(offer_of(ends, [0]), target, blocks)


def test_copies_from_many_threads(ends: Any, tools: Any) -> None:
    blocks = list(range(tools.NUM_BLOCKS))
    sent = [tools.fill(ends.source_pool, block, 3 * block) for block in blocks]
    view, errors = connect(ends), []

    def work(first: int) -> None:
        try:
            mine = blocks[first::4]
            for _ in range(20):
                view.copy(offer_of(ends, mine), ends.target_pool, mine)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [tools.read(ends.target_pool, block) for block in blocks] == sent


def test_threads_and_descriptors_come_back(ends: Any, tools: Any) -> None:
    def cycle() -> None:
        source = source_transport(ends.source.name, ends.source_pool, "s")
        target = target_transport(ends.source.name)
        view = target.connect(source.endpoint(), "s", ends.sender.layout)
        source.close()
        source.close()
        view.close()
        target.close()
        target.close()

    connect(ends)
    gc.collect()
    files, threads = tools.open_files(), threading.active_count()
    for _ in range(20):
        cycle()
    gc.collect()
    assert tools.open_files() == files
    assert threading.active_count() == threads


# Transports whose reader reaches into the sender's memory.


def test_generation_that_changed_before_the_copy(seen_ends: Any, tools: Any) -> None:
    offer = offer_of(seen_ends, [0, 1])
    tools.reuse(seen_ends.source_pool, 1)
    view = connect(seen_ends)
    with pytest.raises(StaleError) as caught:
        view.copy(offer, seen_ends.target_pool, [0, 1])
    assert caught.value.reason == "STALE_GENERATION"
    assert tools.read(seen_ends.target_pool, 0) == bytes(seen_ends.target_pool.block_bytes)
    with pytest.raises(StaleError):
        view.verify(offer)


@pytest.mark.parametrize("piece", [1, copying.PIECE_BYTES], ids=["block by block", "in one run"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("when", ["before the bytes", "after the bytes"])
def test_generation_that_changes_during_the_copy(
    mapped_ends: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, victim: int, when: str, piece: int
) -> None:
    """The block goes to somebody else between the two checks around its own copy."""
    plain: Callable[..., None] = copying.copy_bytes

    def with_reuse(source: memoryview, target: Any, block: int) -> None:
        if when == "after the bytes":
            plain(source, target, block)
        if victim in range(block, block + source.nbytes // target.block_bytes):
            tools.reuse(mapped_ends.source_pool, victim)
        if when == "before the bytes":
            plain(source, target, block)

    monkeypatch.setattr(copying, "copy_bytes", with_reuse)
    monkeypatch.setattr(copying, "PIECE_BYTES", piece)
    with pytest.raises(StaleError):
        connect(mapped_ends).copy(offer_of(mapped_ends, [0, 1]), mapped_ends.target_pool, [0, 1])


def test_offers_of_impossible_blocks(seen_ends: Any, tools: Any) -> None:
    view = connect(seen_ends)
    good = offer_of(seen_ends, [0])
    for block in (tools.NUM_BLOCKS, 1 << 31, -1):
        with pytest.raises(InvalidRequestError):
            view.copy(replace(good, blocks=(block,)), seen_ends.target_pool, [0])
    for extra in ({"payload": b"x"}, {"checksums": (1, 2)}):
        with pytest.raises(InvalidRequestError):
            view.copy(replace(good, **extra), seen_ends.target_pool, [0])


def test_a_pool_with_other_blocks_is_refused(seen_ends: Any) -> None:
    with pytest.raises(IncompatibleError, match="head_dim=16"):
        seen_ends.target.connect(seen_ends.source.endpoint(), "source-1", replace(seen_ends.sender.layout, head_dim=16))


def test_another_incarnation_is_refused(seen_ends: Any) -> None:
    with pytest.raises(StaleError):
        seen_ends.target.connect(seen_ends.source.endpoint(), "source-0", seen_ends.sender.layout)


# Transports whose bytes ride in the stream.


@dataclass
class Damage:
    name: str
    apply: Callable[[Offer], Offer]
    error: type[Exception]


DAMAGES = [
    Damage("flipped bit", lambda o: replace(o, payload=bytes([o.payload[0] ^ 1]) + o.payload[1:]), DataCorruptionError),
    Damage("last byte", lambda o: replace(o, payload=o.payload[:-1] + b"\xff"), DataCorruptionError),
    Damage("swapped sums", lambda o: replace(o, checksums=o.checksums[::-1]), DataCorruptionError),
    Damage("truncated", lambda o: replace(o, payload=o.payload[:-1]), InvalidRequestError),
    Damage("too long", lambda o: replace(o, payload=o.payload + b"x"), InvalidRequestError),
    Damage("empty", lambda o: replace(o, payload=b""), InvalidRequestError),
    Damage("no sums", lambda o: replace(o, checksums=()), InvalidRequestError),
    Damage("a sum too many", lambda o: replace(o, checksums=(*o.checksums, 0)), InvalidRequestError),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.name)
def test_damaged_payload(tools: Any, damage: Damage) -> None:
    ends = tools.make_ends("grpc")
    tools.fill(ends.source_pool, 0, 1)
    tools.fill(ends.source_pool, 1, 2)
    with pytest.raises(damage.error):
        connect(ends).copy(damage.apply(offer_of(ends, [0, 1])), ends.target_pool, [4, 5])
    assert tools.read(ends.target_pool, 5) == bytes(ends.target_pool.block_bytes)
