"""Transfers between pools that aren't alike: whole sequences through sessions, over every transport."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from pools_of_tokens import as_bits, random_scales, random_tokens, read_values
from unlike_ends import NUM_BLOCKS, record, unlike_ends

from kv_transfer import landing
from kv_transfer.messages import Commit, Offer
from kv_transfer.peers import SenderTable
from kv_transfer.staging import COPY_THREADS, StagingPool
from tandem.errors import DataCorruptionError, IncompatibleError, InternalError, InvalidRequestError, StaleError
from tandem.kv_layout import PAIRED_ORDER, KvLayout, staged_bytes

LAYOUT = KvLayout(block_size=16, dtype="bfloat16", num_layers=2, num_kv_heads=3, head_dim=8)
SIZES = [(16, 32), (32, 16), (16, 24), (24, 16), (5, 7), (256, 16), (1, 16)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("prefix_blocks", "end"), [(0, 100), (1, 100), (3, 97), (0, 1), (2, 96)])
@pytest.mark.parametrize("chunk", [1, 40, 512])
def test_other_block_sizes(transport: str, sizes: tuple[int, int], prefix_blocks: int, end: int, chunk: int) -> None:
    """Bit for bit, from the reader's own prefix on, however the prompt was chunked."""
    source, target = (replace(LAYOUT, block_size=size) for size in sizes)
    codes, start = random_tokens(source, end), prefix_blocks * target.block_size
    with unlike_ends(transport, source, target) as ends:
        ends.write(codes)
        lease = ends.grant(start, end)
        send = ends.send(lease, [*range(chunk, end, chunk), end])
        assert torch.equal(as_bits(ends.read(lease)), as_bits(codes[:, :, :, start:]))
        # Nothing that the reader has is sent, but for what shares a block with what it lacks.
        needed = source.blocks_for(end) - start // source.block_size if end > start else 0
        assert send.bytes_offered >= needed * source.block_bytes
        if chunk == 512:
            assert send.bytes_offered == needed * source.block_bytes


def in_order(size: int, order: str) -> KvLayout:
    return replace(LAYOUT, block_size=size, order=order)


PLAIN, PAIRED = LAYOUT.order, PAIRED_ORDER


@pytest.mark.parametrize(
    "layouts",
    [
        (in_order(16, PLAIN), in_order(16, PAIRED)),
        (in_order(16, PAIRED), in_order(16, PLAIN)),
        (in_order(16, PAIRED), in_order(48, PAIRED)),
        (in_order(48, PAIRED), in_order(16, PAIRED)),
        (in_order(5, PLAIN), in_order(16, PAIRED)),
        (in_order(16, PAIRED), in_order(5, PLAIN)),
        (in_order(24, PLAIN), in_order(16, PAIRED)),
        (in_order(48, PAIRED), in_order(32, PLAIN)),
    ],
    ids=lambda pair: " to ".join(f"{one.block_size}{'p' if one.order == PAIRED else ''}" for one in pair),
)
def test_other_orders(any_transport: str, layouts: tuple[KvLayout, KvLayout]) -> None:
    codes = random_tokens(LAYOUT, 91)
    with unlike_ends(any_transport, *layouts) as ends:
        ends.write(codes)
        lease = ends.grant(layouts[1].block_size, 91)
        ends.send(lease, [33, 91])
        assert torch.equal(as_bits(ends.read(lease)), as_bits(codes[:, :, :, layouts[1].block_size :]))


@pytest.mark.parametrize(
    ("first", "second"), [("float32", "bfloat16"), ("bfloat16", "float8_e4m3"), ("int8", "float32")]
)
def test_other_dtypes_with_the_flag(transport: str, first: str, second: str) -> None:
    source, target = replace(LAYOUT, dtype=first, block_size=24), replace(LAYOUT, dtype=second)
    codes = random_tokens(source, 75)
    values = codes.float() * random_scales(source, 75)
    with unlike_ends(transport, source, target, convert_dtype=True) as ends:
        ends.write(codes)
        lease = ends.grant(16, 75)
        ends.send(lease, [10, 50, 75])
        got = read_values(ends.target_pools, target, lease.blocks, 59)
        error = (got - values[:, :, :, 16:]).abs()
        assert (error <= values.abs().max() * {"bfloat16": 2**-8, "float8_e4m3": 2**-4, "float32": 0}[second]).all()
        assert got.any()


def test_other_dtypes_are_refused_without_the_flag(transport: str) -> None:
    source, target = replace(LAYOUT, dtype="float32"), replace(LAYOUT, block_size=32)
    with unlike_ends(transport, source, target) as ends:
        lease = ends.grant(0, 40)
        with pytest.raises(IncompatibleError, match="--convert-kv-dtype") as caught:
            ends.opened(lease)
        assert str(source) in caught.value.message
        assert str(target) in caught.value.message
        assert not lease.committed


def test_numerics_may_differ_in_the_kv_dtype_with_the_flag_only() -> None:
    source, target = replace(LAYOUT, dtype="float32"), LAYOUT
    for numerics, fits in (("v1/kv-bfloat16", True), ("v2/kv-bfloat16", False)):
        with unlike_ends("memory", source, target, convert_dtype=True) as ends:
            ends.receiver = replace(ends.receiver, numerics_id=numerics)
            ends.sender_numerics = "v1/kv-float32"
            if fits:
                ends.opened(ends.grant(0, 40))
            else:
                with pytest.raises(IncompatibleError, match="numerics"):
                    ends.opened(ends.grant(0, 40))


def test_equal_layouts_go_straight_into_the_pool(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No staging, no conversion: the bytes of whole blocks."""

    def never(*_: Any) -> None:
        raise AssertionError("equal layouts need no conversion")

    monkeypatch.setattr(landing, "convert", never)
    codes = random_tokens(LAYOUT, 60)
    with unlike_ends(transport, LAYOUT, LAYOUT) as ends:
        ends.write(codes)
        lease = ends.grant(16, 60)
        ends.send(lease, [60])
        assert torch.equal(as_bits(ends.read(lease)), as_bits(codes[:, :, :, 16:]))
        assert ends.receiver.staging._memory is None


# What a late or wrong reader must not keep.


@pytest.mark.parametrize("name", ["memory", "shm"])
@pytest.mark.parametrize("victim", [0, 2, 4])
def test_a_block_reused_before_the_copy_or_the_commit_is_noticed(name: str, victim: int) -> None:
    with unlike_ends(name, LAYOUT, replace(LAYOUT, block_size=32)) as ends:
        lease = ends.grant(0, 80)
        send, receive = ends.opened(lease)
        send.ready(80, ends.source_blocks)
        offer = send.next_offer()
        assert offer is not None
        plan = receive.on_offer(offer)
        block = ends.source_blocks[victim]
        ends.source_pool.generations[block] += 1
        with pytest.raises(StaleError) as caught:
            receive.copy(plan)
        assert caught.value.reason == "STALE_GENERATION"
        ends.source_pool.generations[block] -= 1
        receive.copy(plan)
        ends.source_pool.generations[block] += 1
        with pytest.raises(StaleError):
            receive.on_commit(Commit(1, 80, record()))
        assert not lease.committed


def test_a_block_reused_during_the_copy_is_not_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check comes after the copy into staging: what was there by then never gets into the reader's blocks."""
    from kv_transfer import copying

    plain = copying.copy_bytes
    with unlike_ends("memory", LAYOUT, replace(LAYOUT, block_size=32)) as ends:
        ends.write(random_tokens(LAYOUT, 32))
        lease = ends.grant(0, 32)
        send, receive = ends.opened(lease)
        send.ready(32, ends.source_blocks)
        offer = send.next_offer()
        assert offer is not None

        def with_reuse(*arguments: Any) -> None:
            plain(*arguments)
            ends.source_pool.generations[offer.blocks[1]] += 1

        monkeypatch.setattr(copying, "copy_bytes", with_reuse)
        with pytest.raises(StaleError):
            receive.copy(receive.on_offer(offer))
        assert not ends.read(lease).any()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda o: replace(o, payload=o.payload[:-1] + b"\xff"), DataCorruptionError),
        (lambda o: replace(o, checksums=o.checksums[::-1]), DataCorruptionError),
        (lambda o: replace(o, payload=o.payload[:-1]), InvalidRequestError),
        (lambda o: replace(o, payload=o.payload + b"x"), InvalidRequestError),
        (lambda o: replace(o, payload=b""), InvalidRequestError),
        (lambda o: replace(o, checksums=o.checksums[:-1]), InvalidRequestError),
        (lambda o: replace(o, checksums=(*o.checksums, 0)), InvalidRequestError),
    ],
)
def test_damaged_bytes_are_not_converted(change: Any, error: type[Exception]) -> None:
    with unlike_ends("grpc", LAYOUT, replace(LAYOUT, block_size=64)) as ends:
        ends.write(random_tokens(LAYOUT, 64))
        lease = ends.grant(0, 64)
        send, receive = ends.opened(lease)
        send.ready(64, ends.source_blocks)
        offer = send.next_offer()
        assert offer is not None
        with pytest.raises(error):
            receive.copy(receive.on_offer(change(offer)))
        assert not ends.read(lease).any()


@pytest.mark.parametrize("ending", ["session", "lease", "retarget"])
def test_what_ends_while_it_is_staged_is_not_acknowledged(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    plain = landing.convert
    with unlike_ends("memory", LAYOUT, replace(LAYOUT, block_size=32)) as ends:
        lease = ends.grant(0, 64)
        send, receive = ends.opened(lease)
        send.ready(64, ends.source_blocks)
        offer = send.next_offer()
        assert offer is not None
        endings = {"session": receive.close, "lease": lease.close, "retarget": lambda: lease.retarget(1)}

        def convert_then_end(*arguments: Any) -> None:
            plain(*arguments)
            endings[ending]()
            assert ends.released == []

        monkeypatch.setattr(landing, "convert", convert_then_end)
        with pytest.raises(StaleError):
            receive.copy(receive.on_offer(offer))
        assert ends.released == (["r"] if ending == "lease" else [])
        assert not lease.committed


def test_another_attempt_may_come_from_yet_another_layout() -> None:
    """Retargeted half way: the second sender's blocks are of another size than the first's."""
    target = replace(LAYOUT, block_size=32)
    codes = random_tokens(LAYOUT, 90)
    with unlike_ends("memory", LAYOUT, target) as ends, unlike_ends("memory", in_order(24, PLAIN), target) as others:
        ends.write(torch.zeros_like(codes))
        others.write(codes)
        lease = ends.grant(0, 90)
        send, receive = ends.opened(lease)
        send.ready(64, ends.source_blocks)
        while (offer := send.next_offer()) is not None:
            send.on_ack(receive.copy(receive.on_offer(offer)))
        assert not lease.retarget(1)
        others.receiver = replace(ends.receiver, senders=SenderTable())
        second, receiving = others.opened(lease, attempt=1)
        second.ready(90, others.source_blocks)
        while (offer := second.next_offer()) is not None:
            second.on_ack(receiving.copy(receiving.on_offer(offer)))
        with pytest.raises(StaleError):
            receive.on_offer(Offer(1, 64, 90, (4, 5), (0, 0)))
        assert not receiving.on_commit(second.commit(record())).already_committed
        assert torch.equal(as_bits(ends.read(lease)), as_bits(codes))


def test_offers_that_break_the_rules_of_unlike_blocks() -> None:
    with unlike_ends("memory", LAYOUT, replace(LAYOUT, block_size=24)) as ends:
        _, receive = ends.opened(ends.grant(24, 80))
        good = Offer(0, 24, 48, (1, 2), (0, 0))
        bad: list[dict[str, Any]] = [
            {"token_start": 16, "blocks": (1, 2)},
            {"token_end": 32, "blocks": (1,), "generations": (0,)},
            {"blocks": (1,), "generations": (0,)},
            {"blocks": (1, 2, 3), "generations": (0, 0, 0)},
        ]
        for change in bad:
            with pytest.raises(InvalidRequestError):
                receive.on_offer(replace(good, **change))
        receive.copy(receive.on_offer(good))


def test_copies_from_many_threads_meet_no_other(transport: str) -> None:
    source, target = replace(LAYOUT, block_size=5), replace(LAYOUT, block_size=16, order=PAIRED_ORDER)
    codes = random_tokens(source, 500)
    with unlike_ends(transport, source, target) as ends:
        ends.source.max_offer_bytes = 9 * source.block_bytes
        ends.write(codes)
        lease = ends.grant(0, 500)
        send, receive = ends.opened(lease)
        send.ready(500, ends.source_blocks)
        while not send.all_offered:
            offers = []
            while (offer := send.next_offer()) is not None:
                offers.append(receive.on_offer(offer))
            threads = [threading.Thread(target=lambda p=plan: send.on_ack(receive.copy(p))) for plan in offers]
            assert len(threads) > 1
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert send.unacknowledged == 0
        assert not receive.on_commit(send.commit(record())).already_committed
        assert torch.equal(as_bits(ends.read(lease)), as_bits(codes))


# Staging.


def test_staging_is_bounded_and_its_pools_stay_the_same() -> None:
    staging = StagingPool(slots=2)
    with staging.slot(3, 100) as first, staging.slot(3, 100) as second:
        first.buffer[:] = b"a" * 300
        second.buffer[:] = b"b" * 300
        assert bytes(first.buffer) == b"a" * 300
        third: list[Any] = []
        waiting = threading.Thread(target=lambda: _hold(staging, third))
        waiting.start()
        waiting.join(0.05)
        assert third == []
    waiting.join()
    assert third[0] in (first, second)
    assert staging.idle


def _hold(staging: StagingPool, held: list[Any]) -> None:
    with staging.slot(3, 100) as slot:
        held.append(slot)


def test_a_slot_comes_back_after_an_error() -> None:
    staging = StagingPool()
    for _ in range(2 * COPY_THREADS):
        with pytest.raises(ZeroDivisionError), staging.slot(1, 8):
            raise ZeroDivisionError
    assert staging.idle


def test_a_slot_holds_what_one_target_block_needs() -> None:
    """Sender's blocks larger than a piece, and many of them for one of the reader's."""
    small = KvLayout(block_size=1, dtype="bfloat16", num_layers=4, num_kv_heads=8, head_dim=128)
    large = replace(small, block_size=96)
    assert staged_bytes(small, large) > landing.PIECE_BYTES
    codes = random_tokens(small, NUM_BLOCKS)
    with unlike_ends("grpc", small, large) as ends:
        ends.write(codes)
        lease = ends.grant(0, NUM_BLOCKS)
        ends.send(lease, [NUM_BLOCKS])
        assert torch.equal(as_bits(ends.read(lease)), as_bits(codes))


def test_pools_must_be_as_the_layouts_say() -> None:
    with unlike_ends("memory", LAYOUT, replace(LAYOUT, block_size=32)) as ends, pytest.raises(InternalError):
        replace(ends.receiver, layout=LAYOUT)
