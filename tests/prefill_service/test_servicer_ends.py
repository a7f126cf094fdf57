"""However a call ends, everything is freed; drains and stops."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest
from prefill_scheduling import expected_tokens
from prefill_serving import collect, metric, record_of, serving, until

from kv_transfer.messages import Commit
from tandem.errors import TandemError
from tandem.service.status import from_rpc_error
from tandem.v1 import prefill_pb2


@pytest.mark.parametrize("moment", ["waiting", "computing", "sending"])
async def test_cancel_frees_everything(moment: str) -> None:
    async with serving(chunk=4, max_sequences=1) as rig:
        go_on = asyncio.Event()

        async def hold(_commit: Commit) -> None:
            await go_on.wait()

        rig.decode.on_commit = hold
        calls = []
        if moment != "sending":
            rig.runner.hold()
        if moment == "waiting":
            calls.append(rig.stub.Prefill(rig.request(record_of(20, seed=2))))
            await until(rig.runner.waiting.is_set)
        call = rig.stub.Prefill(rig.request(record_of(20, seed=1)))
        calls.append(call)
        if moment == "waiting":
            await until(lambda: rig.assembly.worker.engine._commands.qsize() == 1)
            rig.runner.permit()  # commands are taken in between two steps
        assert (await call.read()).WhichOneof("event") == "accepted"
        if moment == "computing":
            await until(rig.runner.waiting.is_set)
        if moment == "sending":
            while (await call.read()).WhichOneof("event") != "first_tokens":
                pass
        steps = len(rig.runner.batches)
        for one in calls:
            one.cancel()
        await until(lambda: rig.assembly.worker.open_calls == 0)
        rig.runner.free()
        await rig.settled()
        assert len(rig.runner.batches) <= steps + 1
        assert rig.assembly.scheduler.counters.worst_steps_after_cancel <= 1
        await until(lambda: metric(rig.metrics, "tandem_nixl_num_kv_expired_reqs_total") == len(calls))


async def test_a_deadline_ends_it_on_both_sides() -> None:
    async with serving() as rig:
        rig.runner.hold()
        with pytest.raises(TandemError) as caught:
            await rig.prefill(rig.request(record_of(9, seed=1)), time_left=0.3)
        assert type(caught.value).__name__ == "DeadlineError"
        await until(lambda: rig.decode.streams == 0)
        rig.runner.free()
        await rig.settled()


async def test_a_failing_step_fails_those_aboard_and_the_service_goes_on() -> None:
    async with serving() as rig:
        rig.runner.fail_steps = 1
        error = await rig.error_of(rig.request(record_of(9, seed=1)))
        assert type(error).__name__ == "InternalError"
        assert "on fire" in error.message
        assert error.metadata.get("side") is None
        await rig.settled()
        assert (await rig.prefill(rig.request(record_of(9, seed=2)))).done is not None


async def test_a_full_queue_is_told_with_a_retry() -> None:
    async with serving(max_waiting=1, max_sequences=1, chunk=4) as rig:
        rig.runner.hold()
        calls = [rig.stub.Prefill(rig.request(record_of(9, seed=1)))]
        await until(rig.runner.waiting.is_set)
        calls.append(rig.stub.Prefill(rig.request(record_of(9, seed=2))))
        await until(lambda: rig.assembly.worker.engine._commands.qsize() == 1)
        refused = asyncio.create_task(rig.error_of(rig.request(record_of(9, seed=3))))
        await until(lambda: rig.assembly.worker.engine._commands.qsize() == 2)
        rig.runner.permit()
        error = await refused
        assert (error.reason, error.retry_after) == ("QUEUE_FULL", 1.0)
        assert (await calls[1].read()).WhichOneof("event") == "accepted"
        for call in calls:
            call.cancel()
        rig.runner.free()
        await rig.settled()


async def test_no_leaks_whatever_happens() -> None:
    draw = random.Random(7)
    async with serving(num_blocks=48, chunk=8, max_sequences=4, decode_blocks=2000) as rig:

        async def one(seed: int) -> str:
            record = record_of(draw.randint(1, 60), seed=seed % 9, n=draw.choice([1, 1, 2]))
            lease = rig.decode.grant(record, needed_end=len(record.prompt))
            request = rig.request(record, lease, transports=(draw.choice(["shm", "grpc"]),))
            timeout = draw.choice([None, None, draw.random() * 0.05])
            call = asyncio.create_task(rig.prefill(request, time_left=timeout))
            if draw.random() < 0.3:
                await asyncio.sleep(draw.random() * 0.03)
                call.cancel()
            try:
                seen = await call
            except asyncio.CancelledError:
                return "cancelled"
            except TandemError as exc:
                return type(exc).__name__
            finally:
                lease.close()
                await until(lambda: lease.released)
            assert {index: tokens[0] for index, tokens in seen.tokens.items()} == expected_tokens(record)
            return "done"

        ends = [end for group in range(6) for end in await asyncio.gather(*(one(group * 20 + i) for i in range(20)))]
        assert set(ends) <= {"done", "cancelled", "DeadlineError", "StaleError", "NotFoundError"}
        assert ends.count("done") > 20
        await rig.settled()
        assert rig.assembly.scheduler.counters.worst_steps_after_cancel <= 1


# -- drain


async def test_drain_finishes_what_it_can_and_takes_nothing_new() -> None:
    async with serving() as rig:
        rig.runner.hold()
        call = asyncio.create_task(rig.prefill(rig.request(record_of(9, seed=1))))
        await until(rig.runner.waiting.is_set)
        drain = asyncio.create_task(rig.assembly.worker.drain(20.0))
        await until(lambda: rig.assembly.worker.draining)
        error = await rig.error_of(rig.request(record_of(9, seed=2)))
        assert (type(error).__name__, error.reason) == ("DrainingError", "DRAINING")
        rig.runner.free()
        assert (await call).done is not None
        await drain
        assert rig.assembly.worker.stopping


async def test_what_does_not_finish_in_the_grace_ends_as_draining() -> None:
    async with serving() as rig:
        go_on = asyncio.Event()

        async def hold(_commit: Commit) -> None:
            await go_on.wait()

        rig.decode.on_commit = hold
        call = rig.stub.Prefill(rig.request(record_of(9, seed=1)))
        while (await call.read()).WhichOneof("event") != "first_tokens":
            pass
        await rig.assembly.worker.drain(0.05)
        with pytest.raises(TandemError) as caught:
            await collect(call)
        assert (type(caught.value).__name__, caught.value.reason) == ("DrainingError", "DRAINING")
        await until(lambda: rig.decode.streams == 0)


async def test_calls_after_the_stop_are_refused() -> None:
    async with serving() as rig:
        watch = rig.stub.WatchPrefillLoad(prefill_pb2.WatchPrefillLoadRequest())
        await watch.read()
        await rig.assembly.close()
        error = await rig.error_of(rig.request(record_of(9, seed=1)))
        assert error.reason == "DRAINING"
        with pytest.raises(grpc.RpcError) as caught:
            await watch.read()
        assert from_rpc_error(caught.value).reason == "DRAINING"


async def test_a_stop_ends_open_calls() -> None:
    async with serving() as rig:
        go_on = asyncio.Event()

        async def hold(_commit: Commit) -> None:
            await go_on.wait()

        rig.decode.on_commit = hold
        call = rig.stub.Prefill(rig.request(record_of(9, seed=1)))
        while (await call.read()).WhichOneof("event") != "first_tokens":
            pass
        await rig.assembly.worker.stop()
        with pytest.raises(TandemError) as caught:
            await collect(call)
        assert caught.value.reason == "DRAINING"
        await until(lambda: rig.decode.streams == 0)


async def test_a_bug_while_sending_is_an_internal_error_of_this_side() -> None:
    async with serving(transports=("grpc",)) as rig:

        def broken(_blocks: object) -> None:
            raise RuntimeError("bug")

        rig.assembly.worker._transports["grpc"].offer_payload = broken
        error = await rig.error_of(rig.request(record_of(9, seed=1)))
        assert (type(error).__name__, error.metadata.get("side")) == ("InternalError", None)
        await rig.settled()
