"""Moments at which two ends of a request meet: none may turn a good end into an error, or leave somebody waiting."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest
from decode_rig import (
    BLOCK,
    LAYOUT,
    FakePrefill,
    TransferEnded,
    eventually,
    expected_tokens,
    read,
    record_of,
    running_rig,
)

from decode_service import servicer, transfer_servicer
from kv_transfer.memory import PoolReader
from kv_transfer.messages import Committed
from kv_transfer.unsettled import Unsettled, UnsettledError
from tandem.record import FinishReason
from tandem.service import wire
from tandem.v1 import decode_pb2
from worker.transfer_messages import open_to_pb


async def read_to_end(transfer: Any) -> None:
    """Raises TransferEnded."""
    while True:
        await read(transfer)


async def test_outputs_that_came_finished_are_told_before_the_end() -> None:
    async with running_rig() as rig:
        for seed in range(20):
            whole = [expected_tokens(record_of(6, max_tokens=5, n=2, seed=seed), index) for index in (0, 1)]
            outputs = [whole[0], whole[1][:4]]
            call = await rig.call(record_of(6, max_tokens=5, n=2, seed=seed, outputs=outputs))
            output = await call.read_to_end()
            assert sorted(output.finished) == [0, 1]
            assert output.ids(1) == whole[1][4:]
        await rig.all_free()


async def test_a_request_that_ends_at_once_does_not_spoil_its_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_rig() as rig:
        sender = FakePrefill(rig, "memory")
        call = await rig.call(record_of(9, max_tokens=1), local=False)
        answer = transfer_servicer._Transfer._answer

        async def slowly(self: Any, message: Any) -> None:
            if isinstance(message, Committed):
                await eventually(lambda: rig.assembly.worker.open_calls == 0)
                await asyncio.sleep(0.05)  # time enough to be told that the lease is over
            await answer(self, message)

        monkeypatch.setattr(transfer_servicer._Transfer, "_answer", slowly)
        sending = asyncio.create_task(sender.send(call.admitted, call.record))
        assert (await call.read_to_end()).ids() == expected_tokens(call.record)
        assert await sending, "it did commit"
        await rig.all_free()
        assert rig.value("tandem_nixl_num_failed_transfers_total") == 0


async def test_a_transfer_counts_from_its_commit_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short request is over, and its transfer cancelled, before the sender has the answer: the bytes came anyway."""
    async with running_rig() as rig:
        sender = FakePrefill(rig, "memory")
        call = await rig.call(record_of(9, max_tokens=3), local=False)
        answer = transfer_servicer._Transfer._answer

        async def never(self: Any, message: Any) -> None:
            if isinstance(message, Committed):
                await asyncio.Event().wait()
            await answer(self, message)

        monkeypatch.setattr(transfer_servicer._Transfer, "_answer", never)
        sending = asyncio.create_task(sender.send(call.admitted, call.record))
        assert (await call.read_to_end()).ids() == expected_tokens(call.record)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await rig.all_free()
        moved = len(call.record.prompt) // BLOCK + 1
        assert rig.value("tandem_nixl_bytes_transferred_total") == moved * LAYOUT.block_bytes
        assert rig.value("tandem_nixl_num_failed_transfers_total") == 0


async def test_a_retarget_while_the_sender_connects_ends_its_silent_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_rig(num_blocks=512, pace=0.01) as rig:
        sender = FakePrefill(rig, "memory")
        call = await rig.call(record_of(9, max_tokens=1500), local=False)
        transport = rig.assembly.transfers._transports["memory"]
        connect, connecting, go_on = transport.connect, threading.Event(), threading.Event()

        def slowly(*arguments: Any) -> Any:
            connecting.set()
            go_on.wait(10)
            return connect(*arguments)

        monkeypatch.setattr(transport, "connect", slowly)
        transfer = rig.transfers.Transfer()
        await transfer.write(open_to_pb(sender.session(call.admitted).open()))
        await asyncio.to_thread(connecting.wait, 10)
        await call.retarget(1, local=True)
        go_on.set()
        with pytest.raises(TransferEnded) as ended:
            await asyncio.wait_for(read_to_end(transfer), 5)
        assert ended.value.args == (grpc.StatusCode.ABORTED, "ATTEMPT_SUPERSEDED")
        assert rig.assembly.worker.open_calls == 1, "the request goes on"
        call.call.cancel()
        await rig.all_free()


@pytest.mark.parametrize("to", ["local", "remote"])
async def test_a_copy_that_may_still_write_keeps_its_blocks_from_the_next_attempt(
    monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """The request goes on elsewhere in time; its blocks are free when nothing can write there any more."""
    reads = Unsettled()

    def hang(*_: Any) -> None:
        raise UnsettledError("the sender hangs", reason="SOURCE_SILENT", reads=reads)

    monkeypatch.setattr(PoolReader, "copy", hang)
    monkeypatch.setattr(servicer, "COPY_WAIT_SECONDS", 0.05)
    async with running_rig() as rig:
        object.__setattr__(rig.assembly.transfers._receiver, "copy_wait_seconds", 0.05)
        sender = FakePrefill(rig, "memory")
        call = await rig.call(record_of(13, max_tokens=6), local=False)
        with pytest.raises(TransferEnded) as ended:
            await sender.send(call.admitted, call.record)
        assert ended.value.args == (grpc.StatusCode.UNAVAILABLE, "SOURCE_SILENT")
        if to == "local":
            source = decode_pb2.PREFILL_SOURCE_LOCAL
            message = decode_pb2.DecodeRetarget(attempt=1, source=source)
            await call.call.write(decode_pb2.DecodeRequest(retarget=message))
            assert (await call.read_error())[0] is grpc.StatusCode.UNAVAILABLE
        else:
            await call.retarget(1, local=False)
            call.admitted.attempt = 1
            with pytest.raises(TransferEnded) as ended:
                await sender.send(call.admitted, call.record)
            assert ended.value.args == (grpc.StatusCode.UNAVAILABLE, "COPY_IN_FLIGHT")
            call.call.cancel()
        await eventually(lambda: rig.assembly.worker.open_calls == 0)
        assert len(rig.assembly.worker.leases) == 1
        reads.settle()
        await rig.all_free()


async def test_a_commit_behind_a_finish_does_not_fail_the_finished_request() -> None:
    async with running_rig() as rig:
        sender = FakePrefill(rig, "memory")
        call = await rig.call(record_of(9), local=False)
        rig.runner.gate.clear()
        busy = await rig.call(record_of(4, seed=2))
        await asyncio.to_thread(rig.runner.stuck.wait)
        commands = rig.assembly.worker.engine._commands
        await call.finish(0)
        await eventually(lambda: commands.qsize() == 1)
        sending = asyncio.create_task(sender.send(call.admitted, call.record))
        await eventually(lambda: commands.qsize() == 2)
        rig.runner.gate.set()
        output = await call.read_to_end()
        assert output.finished == {0: wire.finish_reason_to_pb(FinishReason.STOP)}
        with pytest.raises(TransferEnded):
            await sending
        await busy.read_to_end()
        await rig.all_free()


async def test_a_lease_that_outlives_its_request_is_seen() -> None:
    """Blocks under a copy stay until it is over: for that moment, and if it never ended, they are an orphan's."""
    async with running_rig() as rig:
        call = await rig.call(record_of(9), local=False)
        leases = rig.assembly.worker.leases
        with leases.get(call.admitted.lease_id).copying(call.admitted.attempt):
            assert (rig.value("tandem_leases"), rig.value("tandem_leases_orphaned")) == (1, 0)
            call.call.cancel()
            await eventually(lambda: rig.value("tandem_leases_orphaned") == 1)
            assert rig.value("tandem_leases") == 1
        await rig.all_free()
        assert (rig.value("tandem_leases"), rig.value("tandem_leases_orphaned")) == (0, 0)


async def test_a_retarget_after_a_local_start_changes_nothing() -> None:
    async with running_rig(num_blocks=256, pace=0.001) as rig:
        call = await rig.call(record_of(13, max_tokens=100), local=False)
        assert (await call.retarget(1, local=True)).status == decode_pb2.RETARGET_STATUS_ACCEPTED
        for local in (False, True):
            assert (await call.retarget(2, local=local)).status == decode_pb2.RETARGET_STATUS_COMMITTED
        assert (await call.read_to_end()).ids() == expected_tokens(call.record)
        await rig.all_free()
