"""Errors of a call say whose fault they are."""

from __future__ import annotations

import asyncio
import threading

import pytest
from prefill_serving import metric, record_of, serving


@pytest.mark.parametrize(
    ("change", "code", "reason", "side"),
    [
        ({"target": {"address": "127.0.0.1:1"}}, "UnavailableError", "TARGET_LOST", "target"),
        ({"target": {"incarnation": "another"}}, "StaleError", "STALE_INCARNATION", "target"),
        ({"target": {"lease_id": "unknown"}}, "NotFoundError", "LEASE_UNKNOWN", "target"),
        ({"target": {"attempt": 7}}, "StaleError", "ATTEMPT_SUPERSEDED", "target"),
        ({"incarnation": "another"}, "StaleError", "STALE_INCARNATION", None),
        ({"target": {"transports": ["pigeon"]}}, "IncompatibleError", "INCOMPATIBLE", None),
        ({"target": {"address": "nowhere"}}, "InvalidRequestError", "INVALID_ARGUMENT", None),
        ({"target": {"lease_id": ""}}, "InvalidRequestError", "INVALID_ARGUMENT", None),
        ({"target": {"needed_end": 10}}, "InvalidRequestError", "INVALID_ARGUMENT", None),
        ({"model": "another"}, "IncompatibleError", "MODEL_MISMATCH", None),
        ({"prompt": 600}, "InvalidRequestError", "INVALID_ARGUMENT", None),
        ({"prompt": 300}, "OverloadedError", "EXCEEDS_POOL", None),
    ],
)
async def test_errors_say_whose_fault_it_is(change: dict, code: str, reason: str, side: str | None) -> None:
    async with serving() as rig:
        record = record_of(change.get("prompt", 9), seed=1)
        record.model_id = change.get("model", record.model_id)
        request = rig.request(record, **change.get("target", {}))
        request.incarnation = change.get("incarnation", request.incarnation)
        error = await rig.error_of(request)
        assert (type(error).__name__, error.reason, error.metadata.get("side")) == (code, reason, side)
        reached = side is not None and reason != "TARGET_LOST"
        assert len(rig.decode.opens) == reached
        rig.decode.leases.close_all()
        await rig.settled()


async def test_layouts_that_differ_are_refused_before_any_transfer() -> None:
    async with serving() as rig:
        request = rig.request(record_of(9, seed=1))
        request.target.layout.num_layers = 2
        error = await rig.error_of(request)
        assert type(error).__name__ == "IncompatibleError"
        request.target.layout.block_bytes *= 2
        request.target.layout.layout_id = "made up"
        assert "made up" in (await rig.error_of(request)).message
        assert rig.decode.opens == []
        assert rig.runner.batches == []


async def test_another_numerics_is_a_failed_precondition() -> None:
    async with serving() as rig:
        rig.decode.receiver = type(rig.decode.receiver)(
            **{
                name: getattr(rig.decode.receiver, name)
                for name in ("leases", "pool", "layout", "model_id", "transports")
            },
            numerics_id="other",
        )
        error = await rig.error_of(rig.request(record_of(9, seed=1)))
        assert type(error).__name__ == "IncompatibleError"
        assert error.metadata["side"] == "target"
        assert error.metadata["target"] == rig.decode.address
        await rig.settled()


@pytest.mark.parametrize("how", ["stops", "ends early", "drains", "wants too much", "acks too much", "says nothing"])
async def test_a_decode_worker_that_misbehaves(how: str) -> None:
    async with serving() as rig:
        from tandem.errors import DrainingError
        from tandem.v1 import kv_transfer_pb2 as kv_pb

        async def answer() -> list[kv_pb.TransferResponse]:
            if how == "stops":
                stopping.append(asyncio.create_task(rig.decode.shell.server.stop(0)))
                await asyncio.Event().wait()
            if how == "drains":
                raise DrainingError("about to stop")
            if how == "wants too much":
                return [kv_pb.TransferResponse(opened=kv_pb.TransferOpened(needed_end=1000, block_size=4))]
            if how == "acks too much":
                opened = kv_pb.TransferResponse(opened=kv_pb.TransferOpened(needed_end=8, block_size=4))
                return [opened, kv_pb.TransferResponse(ack=kv_pb.TransferAck(sequence=99))]
            return [kv_pb.TransferResponse()] if how == "says nothing" else []

        stopping: list[asyncio.Task[None]] = []
        rig.decode.answer_open = answer
        rig.runner.hold()
        error = await rig.error_of(rig.request(record_of(9, seed=1)))
        want = {"stops": "TARGET_LOST", "ends early": "TARGET_LOST", "drains": "TARGET_DRAINING"}
        assert error.reason == want.get(how, "TARGET_PROTOCOL")
        assert type(error).__name__ == ("UnavailableError" if how in want else "InternalError")
        rig.runner.free()
        await rig.settled()
        await asyncio.gather(*stopping)
        assert metric(rig.metrics, "tandem_nixl_num_failed_transfers_total") == 1


async def test_a_corrupt_block_is_data_loss() -> None:
    async with serving(transports=("grpc",)) as rig:
        session_offer = rig.assembly.worker._transports["grpc"].offer_payload
        rig.assembly.worker._transports["grpc"].offer_payload = lambda blocks: (
            session_offer(blocks)[0],
            tuple(crc ^ 1 for crc in session_offer(blocks)[1]),
        )
        error = await rig.error_of(rig.request(record_of(9, seed=1)))
        assert type(error).__name__ == "DataCorruptionError"
        await rig.settled()


async def test_the_time_to_open_is_not_the_decode_workers_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that starts with the first transfer, say: nobody beats before Open has come."""
    monkeypatch.setattr("prefill_service.sender.SILENCE_SECONDS", 0.5)
    async with serving() as rig:
        source = rig.assembly.worker._transports["shm"]
        plain, starts, started = source.endpoint, threading.Event(), threading.Event()

        def endpoint() -> bytes:
            starts.set()
            assert started.wait(20)
            return plain()

        source.endpoint = endpoint  # type: ignore[method-assign]
        call = asyncio.ensure_future(rig.prefill(rig.request(record_of(9, seed=1))))
        assert await asyncio.to_thread(starts.wait, 20)
        await asyncio.sleep(1.0)  # twice the silence that would be too long
        assert not call.done()
        started.set()
        await call
        await rig.settled()


async def test_a_way_to_decode_that_falls_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode worker beats while it copies; without a beat the call ends long before its deadline."""
    monkeypatch.setattr("prefill_service.sender.SILENCE_SECONDS", 0.5)

    async with serving() as rig:
        held = asyncio.Event()

        async def hold(_offer: object) -> None:
            await held.wait()

        rig.decode.on_offer = hold
        call = asyncio.ensure_future(rig.error_of(rig.request(record_of(9, seed=1))))
        await asyncio.sleep(1.0)  # twice the silence that would be too long
        assert not call.done()
        rig.decode.silent = True
        error = await call
        assert (error.reason, error.metadata["side"]) == ("TARGET_LOST", "target")
        held.set()
        rig.decode.leases.close_all()
        await rig.settled()
