"""The whole service over loopback: real servers, a fake engine, a small decode side."""

from __future__ import annotations

import asyncio

import pytest
from prefill_scheduling import expected_tokens
from prefill_serving import BLOCK_SIZE, Prefilled, collect, record_of, serving, until

from engine.fake import SLOT_BYTES
from kv_transfer.messages import Commit, Offer
from kv_transfer.session import WINDOW
from tandem.v1 import prefill_pb2

BLOCK_BYTES = BLOCK_SIZE * SLOT_BYTES


@pytest.mark.parametrize("transport", ["shm", "grpc"])
@pytest.mark.parametrize(("length", "chunk"), [(1, 16), (4, 16), (37, 5), (64, 16)])
async def test_a_prompt_goes_over(transport: str, length: int, chunk: int) -> None:
    async with serving(chunk=chunk) as rig:
        record = record_of(length, seed=3)
        lease = rig.decode.grant(record)
        seen = await rig.prefill(rig.request(record, lease, transports=(transport,)))
        assert seen.events == ["accepted", "first_tokens", "done"]
        assert seen.tokens == {0: [expected_tokens(record)[0]]}
        assert seen.done.status == prefill_pb2.COMMIT_STATUS_COMMITTED
        assert seen.done.bytes_transferred == -(-length // BLOCK_SIZE) * BLOCK_BYTES
        assert seen.done.prefill_seconds > 0
        assert seen.done.transfer_seconds > 0
        assert rig.decode.opens[0].transport == transport
        assert rig.decode.commits[0].record.outputs[0].token_ids == seen.tokens[0]
        assert record.outputs[0].token_ids == []
        assert lease.committed
        rig.decode.check_kv(record, lease)
        await rig.settled()


@pytest.mark.parametrize(("host", "transport"), [("here", "shm"), ("", "shm"), ("elsewhere", "grpc")])
async def test_shared_memory_is_for_one_host(host: str, transport: str) -> None:
    async with serving() as rig:
        record = record_of(20)
        lease = rig.decode.grant(record)
        await rig.prefill(rig.request(record, lease, host_id=host))
        assert rig.decode.opens[0].transport == transport


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_only_missing_blocks_travel(transport: str) -> None:
    async with serving(chunk=5) as rig:
        record = record_of(30, seed=1)
        lease = rig.decode.grant(record, needed_start=12)
        seen = await rig.prefill(rig.request(record, lease, transports=(transport,)))
        assert seen.done.bytes_transferred == 5 * BLOCK_BYTES
        assert rig.decode.offers[0].token_start == 12
        rig.decode.check_kv(record, lease, prefix_blocks=3)
        await rig.settled()


async def test_nothing_missing_still_commits() -> None:
    async with serving() as rig:
        record = record_of(8, seed=1)
        lease = rig.decode.grant(record, needed_start=8)
        seen = await rig.prefill(rig.request(record, lease))
        assert (seen.done.bytes_transferred, seen.done.transfer_seconds) == (0, 0.0)
        assert lease.committed


async def test_each_chunk_travels_while_the_next_computes() -> None:
    async with serving(chunk=8) as rig:
        rig.runner.hold()
        record = record_of(24, seed=1)
        call = asyncio.create_task(rig.prefill(rig.request(record)))
        for chunk in (1, 2):
            await until(rig.runner.waiting.is_set)
            rig.runner.permit()
            await until(lambda chunk=chunk: bool(rig.decode.offers) and rig.decode.offers[-1].token_end == 8 * chunk)
            await until(rig.runner.waiting.is_set)
            assert len(rig.runner.batches) == chunk, "the offer came while the next step was running"
        rig.runner.free()
        assert (await call).events == ["accepted", "first_tokens", "done"]
        await rig.settled()


@pytest.mark.parametrize("length", [24, 26])
async def test_blocks_of_the_prefix_cache_are_offered_before_anything_is_computed(length: int) -> None:
    async with serving(chunk=64) as rig:
        await rig.prefill(rig.request(record_of(length, seed=1)))
        await rig.settled()
        rig.runner.hold()
        rig.decode.offers.clear()
        record = record_of(length, seed=1)
        lease = rig.decode.grant(record)
        call = asyncio.create_task(rig.prefill(rig.request(record, lease)))
        cached = (length - 1) // BLOCK_SIZE * BLOCK_SIZE
        await until(lambda: bool(rig.decode.offers) and rig.decode.offers[-1].token_end == cached)
        assert len(rig.runner.batches) == 1
        rig.runner.free()
        seen = await call
        assert seen.cached_tokens == (23 if length == 24 else 24)
        assert rig.runner.batches[-1].num_tokens == length - seen.cached_tokens
        rig.decode.check_kv(record, lease)
        await rig.settled()


async def test_first_tokens_do_not_wait_for_the_transfer() -> None:
    async with serving() as rig:
        go_on = asyncio.Event()

        async def hold(_commit: Commit) -> None:
            await go_on.wait()

        rig.decode.on_commit = hold
        call = rig.stub.Prefill(rig.request(record_of(9, seed=1)))
        seen = Prefilled()
        while not seen.tokens:
            seen.take(await call.read())
        assert seen.events == ["accepted", "first_tokens"]
        assert rig.assembly.scheduler.pool.num_free < rig.assembly.scheduler.pool.num_blocks
        go_on.set()
        rest = await collect(call)
        assert rest.events == ["done"]
        await rig.settled()


async def test_several_outputs_and_a_record_that_goes_on() -> None:
    async with serving() as rig:
        several = record_of(9, seed=5, n=3)
        seen = await rig.prefill(rig.request(several))
        assert {index: tokens[0] for index, tokens in seen.tokens.items()} == expected_tokens(several)
        assert len(rig.decode.commits[-1].record.outputs) == 3
        going_on = record_of(9, seed=6, outputs=[[7, 8, 9]])
        lease = rig.decode.grant(going_on)
        seen = await rig.prefill(rig.request(going_on, lease))
        assert seen.tokens == {0: [expected_tokens(going_on)[0]]}
        assert rig.decode.commits[-1].record.outputs[0].token_ids == [7, 8, 9, *seen.tokens[0]]
        rig.decode.check_kv(going_on, lease)
        await rig.settled()


async def test_unacknowledged_offers_are_bounded() -> None:
    async with serving(chunk=4) as rig:
        go_on = asyncio.Event()

        async def hold(_offer: Offer) -> None:
            await go_on.wait()

        rig.decode.on_offer = hold
        rig.runner.hold()
        call = asyncio.create_task(rig.prefill(rig.request(record_of(80, seed=1), transports=("grpc",))))
        await until(rig.runner.waiting.is_set)
        job = next(iter(rig.assembly.worker._calls.values()))
        for offers in range(1, WINDOW + 1):
            rig.runner.permit()
            await until(lambda offers=offers: job._transfer._session.unacknowledged == offers)
        rig.runner.free()
        await until(lambda: job.deltas is not None)
        assert job._transfer._session.unacknowledged == WINDOW
        assert not job._transfer._session.all_offered
        go_on.set()
        assert (await call).done.bytes_transferred == 20 * BLOCK_BYTES
        await rig.settled()


async def test_already_committed_is_told() -> None:
    async with serving() as rig:
        record = record_of(9, seed=1)
        lease = rig.decode.grant(record)

        async def commit_first(_commit: Commit) -> None:
            lease.commit(0)

        rig.decode.on_commit = commit_first
        seen = await rig.prefill(rig.request(record, lease))
        assert seen.done.status == prefill_pb2.COMMIT_STATUS_ALREADY_COMMITTED
        await rig.settled()
