"""The decode worker over real sockets: streams, hand-off by every transport, retargets, ends, drain, load."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import grpc
import pytest
from decode_rig import (
    INCARNATION,
    LAYOUT,
    Call,
    FakePrefill,
    FarRunner,
    TransferEnded,
    expected_tokens,
    read,
    read_raw,
    reason_of,
    record_of,
    running_rig,
)
from decode_scheduling import Knowing

from decode_service.speculation.config import SpeculationConfig
from engine.batch import Batch, SampledToken, StepOutput
from kv_transfer.messages import Opened
from tandem.record import OutputState, TokenLogprobs
from tandem.service import pulse
from tandem.v1 import decode_pb2, kv_transfer_pb2
from worker.transfer_messages import offer_to_pb, open_to_pb

TRANSPORTS = ("memory", "shm", "grpc")


async def test_a_local_request_streams_to_its_end() -> None:
    async with running_rig() as rig:
        call = await rig.call(record_of(11, max_tokens=9))
        assert (call.admitted.lease_id, call.admitted.needed_end) == ("", 11)
        output = await call.read_to_end()
        assert output.ids() == expected_tokens(call.record)
        assert list(output.finished) == [0]
        await rig.all_free()
        assert rig.value("tandem_generation_tokens_total") == 9
        assert rig.value("tandem_prompt_tokens_total") == 11


async def test_many_at_once_each_gets_its_own_tokens() -> None:
    async with running_rig(num_blocks=48) as rig:
        records = [record_of(5 + i, max_tokens=10, n=1 + i % 2, seed=i) for i in range(8)]
        calls = [await rig.call(record) for record in records]
        outputs = await asyncio.gather(*(call.read_to_end() for call in calls))
        for record, output in zip(records, outputs, strict=True):
            for index in range(record.sampling.n):
                assert output.ids(index) == expected_tokens(record, index)
        await rig.all_free()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("n", [1, 3])
async def test_remote_prefill_by_every_transport(transport: str, n: int) -> None:
    async with running_rig() as rig:
        sender = FakePrefill(rig, transport)
        try:
            call = await rig.call(record_of(21, max_tokens=6, n=n), local=False)
            assert (call.admitted.needed_start, call.admitted.needed_end) == (0, 21)
            assert await sender.send(call.admitted, call.record)
            output = await call.read_to_end()
            for index in range(n):
                assert output.ids(index) == expected_tokens(call.record, index), "the first token is streamed too"
            again = await rig.call(record_of(21, max_tokens=6, n=n), local=False)
            assert again.admitted.cached_tokens == 20, "only missing blocks travel"
            assert await sender.send(again.admitted, again.record)
            assert (await again.read_to_end()).ids() == expected_tokens(call.record)
            await rig.all_free()
            assert rig.value("tandem_nixl_bytes_transferred_total") == 7 * LAYOUT.block_bytes
        finally:
            sender.close()


async def test_what_a_transfer_brings_is_taken_where_steps_compute() -> None:
    """The step after a commit names the blocks that came, once; later requests find them in the prefix cache."""
    async with running_rig(runner=FarRunner(64)) as rig:
        sender = FakePrefill(rig, "shm")
        try:
            for cached in (0, 20):
                call = await rig.call(record_of(21, max_tokens=6), local=False)
                assert call.admitted.cached_tokens == cached
                assert await sender.send(call.admitted, call.record)
                assert (await call.read_to_end()).ids() == expected_tokens(call.record)
            await rig.all_free()
        finally:
            sender.close()


async def test_a_migrated_record_over_a_transfer() -> None:
    async with running_rig() as rig:
        sender = FakePrefill(rig, "grpc")
        whole = expected_tokens(record_of(10, max_tokens=8))
        call = await rig.call(record_of(10, max_tokens=8, outputs=[whole[:3]]), local=False)
        assert call.admitted.needed_end == 13
        assert await sender.send(call.admitted, record_of(10, max_tokens=8, outputs=[whole[:3]]))
        assert (await call.read_to_end()).ids() == whole[3:]
        await rig.all_free()


async def test_half_close_goes_on_and_cancel_ends() -> None:
    async with running_rig(num_blocks=256, pace=0.001) as rig:
        first = await rig.call(record_of(8, max_tokens=12, seed=1))
        await first.call.done_writing()
        assert (await first.read_to_end()).ids() == expected_tokens(first.record)
        second = await rig.call(record_of(8, max_tokens=500, seed=2))
        await second.read_until(lambda output: len(output.ids()) > 3)
        second.call.cancel()
        await rig.all_free()
        assert rig.value("tandem_requests_cancelled_total") == 1
        assert rig.value("tandem_steps_after_cancel_total") <= 1


async def test_cancel_while_receiving_frees_and_ends_the_transfer() -> None:
    async with running_rig() as rig:
        sender = FakePrefill(rig, "memory")
        call = await rig.call(record_of(9), local=False)
        transfer = rig.transfers.Transfer()
        await transfer.write(open_to_pb(sender.session(call.admitted).open()))
        await read(transfer)
        call.call.cancel()
        with pytest.raises(TransferEnded) as ended:
            await read(transfer)
        assert ended.value.args[0] is grpc.StatusCode.ABORTED
        await rig.all_free()


async def test_cancelled_admissions_leak_nothing() -> None:
    async with running_rig(pace=0.002) as rig:
        busy = await rig.call(record_of(4, max_tokens=200))
        for i in range(20):
            call = Call(rig, record_of(9, seed=i + 2), local=bool(i % 2))
            await call.call.write(decode_pb2.DecodeRequest(start=call.start))
            await asyncio.sleep(0.0005 * (i % 4))
            call.call.cancel()
        busy.call.cancel()
        await rig.all_free()


@pytest.mark.parametrize(
    ("record", "incarnation", "code", "reason"),
    [
        (record_of(5), "an-old-life", grpc.StatusCode.ABORTED, "STALE_INCARNATION"),
        (record_of(5, model_id="other"), INCARNATION, grpc.StatusCode.FAILED_PRECONDITION, "MODEL_MISMATCH"),
        (record_of([1, 9999]), INCARNATION, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
        (record_of(5, max_tokens=4000), INCARNATION, grpc.StatusCode.RESOURCE_EXHAUSTED, "EXCEEDS_POOL"),
    ],
)
async def test_refusals(record: object, incarnation: str, code: grpc.StatusCode, reason: str) -> None:
    async with running_rig() as rig:
        call = Call(rig, record, local=True, incarnation=incarnation)
        await call.call.write(decode_pb2.DecodeRequest(start=call.start))
        assert await call.read_error() == (code, reason)
        await rig.all_free()


@pytest.mark.parametrize(
    "message",
    [
        decode_pb2.DecodeRequest(finish=decode_pb2.DecodeFinish(index=0)),
        decode_pb2.DecodeRequest(),
        decode_pb2.DecodeRequest(start=decode_pb2.DecodeStart(incarnation=INCARNATION)),
        None,
    ],
)
async def test_a_stream_must_begin_with_a_good_start(message: decode_pb2.DecodeRequest | None) -> None:
    async with running_rig() as rig:
        call = Call(rig, record_of(5), local=True)
        if message is None:
            await call.call.done_writing()
        else:
            await call.call.write(message)
        assert (await call.read_error())[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_second_start_ends_the_request() -> None:
    async with running_rig(num_blocks=256, pace=0.001) as rig:
        call = await rig.call(record_of(5, max_tokens=500))
        await call.call.write(decode_pb2.DecodeRequest(start=call.start))
        assert (await call.read_error())[0] is grpc.StatusCode.INVALID_ARGUMENT
        await rig.all_free()


async def test_silent_clients_are_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decode_service.servicer.FIRST_MESSAGE_SECONDS", 0.05)
    monkeypatch.setattr("decode_service.transfer_servicer.FIRST_MESSAGE_SECONDS", 0.05)
    async with running_rig() as rig:
        assert (await Call(rig, record_of(5), local=True).read_error())[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(TransferEnded) as ended:
            await read(rig.transfers.Transfer())
        assert ended.value.args[0] is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_the_gateway_finishes_one_output() -> None:
    async with running_rig(num_blocks=512, pace=0.001) as rig:
        call = await rig.call(record_of(6, max_tokens=400, n=2))
        await call.read_until(lambda output: output.ids(0) and output.ids(1))
        await call.finish(0)
        await call.read_until(lambda output: 0 in output.finished)
        await call.finish(1)
        output = await call.read_to_end()
        for index in (0, 1):
            assert output.ids(index) == expected_tokens(record_of(6, max_tokens=len(output.ids(index)), n=2), index)
        await rig.all_free()


async def test_a_bad_finish_ends_the_request() -> None:
    async with running_rig(num_blocks=256, pace=0.001) as rig:
        call = await rig.call(record_of(6, max_tokens=400))
        await call.finish(7)
        assert (await call.read_error())[0] is grpc.StatusCode.INVALID_ARGUMENT
        await rig.all_free()


async def test_a_lost_sender_and_a_retarget_to_local() -> None:
    async with running_rig() as rig:
        sender = FakePrefill(rig, "memory")
        call = await rig.call(record_of(13, max_tokens=6), local=False)
        whole = expected_tokens(call.record)
        table, _ = sender.compute(call.record)
        session, transfer = sender.session(call.admitted), rig.transfers.Transfer()
        await transfer.write(open_to_pb(session.open()))
        session.on_opened(Opened(*(await read(transfer)).opened_range))
        session.ready(8, table)
        await transfer.write(offer_to_pb(session.next_offer()))
        await read(transfer)
        transfer.cancel()
        answer = await call.retarget(1, local=True, emitted=whole[:1])
        assert answer.status == decode_pb2.RETARGET_STATUS_ACCEPTED
        assert (await call.read_to_end()).ids() == whole[1:], "forced tokens are not drawn again"
        await rig.all_free()


async def test_a_retarget_to_another_sender_shuts_the_first_out() -> None:
    async with running_rig() as rig:
        sender = FakePrefill(rig, "grpc")
        call = await rig.call(record_of(13, max_tokens=6), local=False)
        whole = expected_tokens(call.record)
        first = rig.transfers.Transfer()
        await first.write(open_to_pb(sender.session(call.admitted).open()))
        await read(first)
        answer = await call.retarget(1, local=False, emitted=whole[:1])
        assert (answer.status, answer.needed_start, answer.needed_end) == (decode_pb2.RETARGET_STATUS_ACCEPTED, 0, 13)
        with pytest.raises(TransferEnded) as ended:
            await read(first)
        assert ended.value.args[1] == "ATTEMPT_SUPERSEDED"
        with pytest.raises(TransferEnded):
            await sender.send(call.admitted, call.record)
        call.admitted.attempt = 1
        assert await sender.send(call.admitted, record_of(13, max_tokens=6, outputs=[whole[:1]]))
        assert (await call.read_to_end()).ids() == whole[1:]
        await rig.all_free()


async def test_a_retarget_after_the_commit_changes_nothing() -> None:
    async with running_rig(num_blocks=256, pace=0.001) as rig:
        sender = FakePrefill(rig, "grpc")
        call = await rig.call(record_of(13, max_tokens=100), local=False)
        assert await sender.send(call.admitted, call.record)
        answer = await call.retarget(1, local=True)
        assert answer.status == decode_pb2.RETARGET_STATUS_COMMITTED
        assert (await call.read_to_end()).ids() == expected_tokens(call.record)
        local = await rig.call(record_of(6, max_tokens=60, seed=2))
        assert (await local.retarget(1, local=False)).status == decode_pb2.RETARGET_STATUS_COMMITTED
        assert (await local.read_to_end()).ids() == expected_tokens(local.record)


async def test_bad_retargets_end_the_request() -> None:
    async with running_rig() as rig:
        call = await rig.call(record_of(13), local=False)
        await call.call.write(decode_pb2.DecodeRequest(retarget=decode_pb2.DecodeRetarget(attempt=1)))
        assert (await call.read_error())[0] is grpc.StatusCode.INVALID_ARGUMENT
        call = await rig.call(record_of(13), local=False, attempt=3)
        message = decode_pb2.DecodeRetarget(attempt=3, source=decode_pb2.PREFILL_SOURCE_LOCAL)
        await call.call.write(decode_pb2.DecodeRequest(retarget=message))
        assert (await call.read_error())[0] is grpc.StatusCode.ABORTED
        await rig.all_free()


async def test_a_corrupt_payload_is_refused_and_another_attempt_is_fine() -> None:
    async with running_rig() as rig:
        sender = FakePrefill(rig, "grpc")
        call = await rig.call(record_of(13, max_tokens=5), local=False)
        table, _ = sender.compute(call.record)
        session, transfer = sender.session(call.admitted), rig.transfers.Transfer()
        await transfer.write(open_to_pb(session.open()))
        session.on_opened(Opened(*(await read(transfer)).opened_range))
        session.ready(13, table)
        offer = offer_to_pb(session.next_offer())
        offer.offer.payload = b"\xff" + offer.offer.payload[1:]
        await transfer.write(offer)
        with pytest.raises(TransferEnded) as ended:
            await read(transfer)
        assert ended.value.args[0] is grpc.StatusCode.DATA_LOSS
        await call.retarget(1, local=False)
        call.admitted.attempt = 1
        assert await sender.send(call.admitted, call.record)
        assert (await call.read_to_end()).ids() == expected_tokens(call.record)
        await rig.all_free()
        assert rig.value("tandem_nixl_num_failed_transfers_total") >= 1


@pytest.mark.parametrize("kind", ["offer_first", "silence", "early_end", "open_twice", "bad_record"])
async def test_transfers_that_break_the_rules(kind: str) -> None:
    async with running_rig() as rig:
        sender = FakePrefill(rig, "memory")
        call = await rig.call(record_of(4), local=False)
        transfer = rig.transfers.Transfer()
        opening = open_to_pb(sender.session(call.admitted).open())
        if kind == "offer_first":
            await transfer.write(kv_transfer_pb2.TransferRequest(offer=kv_transfer_pb2.TransferOffer()))
        elif kind == "silence":
            await transfer.done_writing()
        elif kind == "bad_record":
            record = record_of(4)
            record.outputs[0] = OutputState([10_000])
            sender.compute = lambda _: (real_table, record)  # type: ignore[method-assign]
            real_table = FakePrefill.compute(sender, record_of(4))[0]
            with pytest.raises(TransferEnded) as ended:
                await sender.send(call.admitted, record_of(4))
            assert ended.value.args[0] is grpc.StatusCode.INVALID_ARGUMENT
            assert (await call.read_error())[0] is grpc.StatusCode.INVALID_ARGUMENT, "the request must not hang"
            await rig.all_free()
            return
        else:
            await transfer.write(opening)
            await read(transfer)
            await (transfer.done_writing() if kind == "early_end" else transfer.write(opening))
        with pytest.raises(TransferEnded) as ended:
            await read(transfer)
        assert ended.value.args[0] is grpc.StatusCode.INVALID_ARGUMENT
        call.call.cancel()
        await rig.all_free()


async def test_a_failing_step_fails_those_aboard_and_the_service_goes_on() -> None:
    async with running_rig(num_blocks=256, pace=0.001) as rig:
        call = await rig.call(record_of(5, max_tokens=500))
        await call.read_until(lambda output: output.ids())
        rig.runner.fail_next = True
        assert (await call.read_error())[0] is grpc.StatusCode.INTERNAL
        again = await rig.call(record_of(5, max_tokens=4))
        assert (await again.read_to_end()).ids() == expected_tokens(again.record)
        await rig.all_free()


class Talker:
    """An engine that only talks: quick, and many bytes a token."""

    def warm_up(self) -> None:
        pass

    def run(self, batch: Batch) -> StepOutput:
        logprobs = TokenLogprobs(-1.0, tuple(range(20)), (-2.0,) * 20)
        return StepOutput([[SampledToken(5, logprobs) for _ in part.samples] for part in batch.slices])


async def test_a_slow_reader_ends_only_its_own_stream() -> None:
    async with running_rig(num_blocks=2048, runner=Talker(), stream_limit=64) as rig:
        # A fixed window of 64 KiB, as of a client that has stopped reading: some 300 of these tokens.
        channel = grpc.aio.insecure_channel(rig.address, options=[("grpc.http2.bdp_probe", 0)])
        slow = await replace(rig, channel=channel).call(record_of(5, max_tokens=4000, logprobs=20))
        await asyncio.wait_for(rig.all_free(), 30)
        quick = await rig.call(record_of(5, max_tokens=40, seed=2))
        assert len((await quick.read_to_end()).ids()) == 40
        code, reason = await slow.read_error()
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER")
        assert len(slow.output.ids()) < 4000
        await channel.close()


async def test_drain_lets_finish_and_takes_nothing_new() -> None:
    async with running_rig(num_blocks=256, pace=0.001) as rig:
        call = await rig.call(record_of(5, max_tokens=100))
        await call.read_until(lambda output: output.ids())
        drain = asyncio.create_task(rig.assembly.worker.drain(30.0))
        await asyncio.sleep(0)
        late = Call(rig, record_of(5), local=True)
        await late.call.write(decode_pb2.DecodeRequest(start=late.start))
        assert await late.read_error() == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert (await call.read_to_end()).ids() == expected_tokens(call.record)
        await drain


async def test_drain_hands_back_what_does_not_finish() -> None:
    async with running_rig(num_blocks=1024, pace=0.001) as rig:
        running = await rig.call(record_of(5, max_tokens=3000))
        receiving = await rig.call(record_of(9, seed=2), local=False)
        await running.read_until(lambda output: output.ids())
        drain = asyncio.create_task(rig.assembly.worker.drain(0.05))
        for call in (running, receiving):
            assert await call.read_error() == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        got = running.output.ids()
        assert got == expected_tokens(record_of(5, max_tokens=len(got)))
        await drain
        assert rig.assembly.pool.num_free == rig.assembly.pool.num_blocks
        assert rig.assembly.worker.open_calls == 0


async def test_info() -> None:
    async with running_rig() as rig:
        info = (await rig.decode.GetDecodeInfo(decode_pb2.GetDecodeInfoRequest())).info
        assert (info.incarnation, info.model_id, info.total_blocks) == (INCARNATION, "model-1", 64)
        assert info.layout.layout_id == LAYOUT.layout_id
        assert list(info.transports) == list(TRANSPORTS)


async def test_load_follows_changes_and_the_engine_s_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "STEP_SECONDS", 0.6)
    async with running_rig(num_blocks=256, pace=0.001) as rig:
        watch = rig.decode.WatchDecodeLoad(decode_pb2.WatchDecodeLoadRequest())
        load = (await watch.read()).load
        assert (load.running_sequences, load.free_blocks, load.draining) == (0, 256, False)
        call = await rig.call(record_of(5, max_tokens=900))
        while not load.running_sequences:
            load = (await watch.read()).load
        assert load.free_blocks < 256
        rig.runner.stuck.clear()
        rig.runner.gate.clear()
        await asyncio.to_thread(rig.runner.stuck.wait)
        assert await silent(watch), "a stuck engine must not look alive"
        rig.runner.gate.set()
        call.call.cancel()


async def silent(stream: Any, most: int = 3) -> bool:
    """True when nothing comes for 2.5 seconds, after at most so many messages that were under way."""
    for _ in range(most + 1):
        try:
            await asyncio.wait_for(stream.read(), 2.5)
        except TimeoutError:
            return True
    return False


async def test_load_beats_when_idle_and_says_draining() -> None:
    async with running_rig() as rig:
        watch = rig.decode.WatchDecodeLoad(decode_pb2.WatchDecodeLoadRequest())
        for _ in range(2):
            await asyncio.wait_for(watch.read(), 3)
        drain = asyncio.create_task(rig.assembly.worker.drain(1.0))
        while (response := await read_raw(watch)) is not grpc.aio.EOF:
            assert response.load.draining
        assert reason_of(await watch.trailing_metadata()) == "DRAINING"
        await drain


async def test_a_long_step_silences_nobody() -> None:
    async with running_rig() as rig:
        call = await rig.call(record_of(9), local=False)
        rig.runner.gate.clear()
        busy = await rig.call(record_of(4, seed=2))
        await asyncio.to_thread(rig.runner.stuck.wait)
        waiting = await rig.call(record_of(4, seed=3))
        for aboard in (call, waiting):
            await asyncio.wait_for(aboard.read_until(lambda output: len(output.heartbeats) >= 2), 8)
        rig.runner.gate.set()
        for open_call in (call, busy, waiting):
            open_call.call.cancel()


async def test_heartbeats_come_while_nothing_else_does_and_stop_with_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pulse, "STEP_SECONDS", 0.6)
    async with running_rig() as rig:
        call = await rig.call(record_of(9), local=False)
        await asyncio.wait_for(call.read_until(lambda output: len(output.heartbeats) >= 2), 5)
        rig.runner.gate.clear()
        busy = await rig.call(record_of(4, seed=2))
        await asyncio.to_thread(rig.runner.stuck.wait)
        assert await silent(call.call), "a stuck engine must not look alive"
        rig.runner.gate.set()
        busy.call.cancel()


async def test_random_lives_leave_nothing_behind() -> None:
    """A third cancelled at random moments, a third over transfers, tiny pool: everything comes back."""
    dice = random.Random(7)
    async with running_rig(num_blocks=40, pace=0.0005) as rig:
        sender = FakePrefill(rig, "memory", num_blocks=2000)
        room = asyncio.Semaphore(6)

        async def live(number: int) -> str:
            record = record_of(
                dice.randint(1, 24), max_tokens=dice.randint(1, 12), n=dice.choice((1, 1, 2)), seed=number
            )
            remote, patience = dice.random() < 0.4, dice.uniform(0, 0.05) if dice.random() < 0.33 else 30.0
            call = Call(rig, record, local=not remote)
            try:
                async with room, asyncio.timeout(patience):
                    await call.call.write(decode_pb2.DecodeRequest(start=call.start))
                    response = await read_raw(call.call)
                    if response is grpc.aio.EOF:
                        assert await call.call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                        return "refused"
                    if remote:
                        await sender.send(response.admitted, record)
                    output = await call.read_to_end()
                    assert all(output.ids(i) == expected_tokens(record, i) for i in range(record.sampling.n))
                    return "done"
            except (TimeoutError, grpc.aio.AioRpcError, TransferEnded):
                call.call.cancel()
                return "cancelled"

        ends = await asyncio.gather(*(live(number) for number in range(150)))
        assert ends.count("done") > 50
        assert ends.count("cancelled") > 10
        await rig.all_free()
        counters = await rig.assembly.worker.engine.call(lambda scheduler: scheduler.counters)
        assert counters.worst_steps_after_cancel <= 1


async def test_a_transfer_beats_for_a_sender_that_knows_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its Open on, and only for those: an older sender takes an unknown message for a fault."""
    monkeypatch.setattr("decode_service.transfer_servicer.HEARTBEAT_SECONDS", 0.05)
    async with running_rig() as rig:
        sender = FakePrefill(rig, "grpc")
        for knows in (True, False):
            call = await rig.call(record_of(9, seed=1 + knows), local=False)
            transfer = rig.transfers.Transfer()
            opening = open_to_pb(sender.session(call.admitted).open())
            opening.open.heartbeats = knows
            await transfer.write(opening)
            assert (await transfer.read()).WhichOneof("event") == "opened"
            if knows:
                assert (await transfer.read()).WhichOneof("event") == "heartbeat"
            else:
                reading = asyncio.ensure_future(transfer.read())
                assert not (await asyncio.wait({reading}, timeout=0.3))[0]
                reading.cancel()
            transfer.cancel()
            call.call.cancel()
        await rig.all_free()
        sender.close()


async def test_drafts_come_several_tokens_a_step_and_are_counted() -> None:
    """With three right tokens of four a draft, in company, after a transfer and on the stream itself."""
    records = [record_of(9 + i, max_tokens=24, seed=i + 1) for i in range(3)]
    truth = {record.prompt[0]: expected_tokens(record) for record in records}
    proposer = Knowing(lambda key: [], lambda ask: 3)
    proposer.told = lambda ask: truth[ask.prompt[0]]
    speculation = SpeculationConfig([proposer], max_tokens=4, fixed=True)
    async with running_rig(speculation=speculation) as rig:
        sender = FakePrefill(rig, "memory")
        try:
            remote = await rig.call(records[0], local=False)
            assert await sender.send(remote.admitted, remote.record)
            calls = [remote, *[await rig.call(record) for record in records[1:]]]
            outputs = await asyncio.gather(*(call.read_to_end() for call in calls))
        finally:
            sender.close()
        for record, output in zip(records, outputs, strict=True):
            assert output.ids() == expected_tokens(record)
            assert output.drafted > output.accepted >= 16
        await rig.all_free()
        drafted, accepted = (sum(getattr(each, name) for each in outputs) for name in ("drafted", "accepted"))
        assert rig.value("tandem_spec_decode_num_draft_tokens_total") == drafted
        assert rig.value("tandem_spec_decode_num_accepted_tokens_total") == accepted
        drafts = rig.value("tandem_spec_decode_num_drafts_total")
        assert rig.value("tandem_spec_decode_mean_acceptance_length") == pytest.approx(1 + accepted / drafts)
        registry, first = rig.metrics.registry, {"role": "decode", "position": "0"}
        for name, value in (("draft", drafts), ("accepted", accepted)):
            found = registry.get_sample_value(f"tandem_spec_decode_num_{name}_tokens_per_pos_total", first)
            assert found is not None
            assert 0 < found <= value
        assert rig.value("tandem_generation_tokens_total") == sum(len(output.ids()) for output in outputs) - 1
