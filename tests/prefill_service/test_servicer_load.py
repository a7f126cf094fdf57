"""Info, load, progress, metrics."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from prefill_serving import BLOCK_SIZE, metric, record_of, serving, until

from engine.fake import SLOT_BYTES
from tandem.service import pulse
from tandem.v1 import prefill_pb2

BLOCK_BYTES = BLOCK_SIZE * SLOT_BYTES


async def test_info_says_what_the_worker_is() -> None:
    async with serving() as rig:
        info = (await rig.stub.GetPrefillInfo(prefill_pb2.GetPrefillInfoRequest())).info
        assert (info.incarnation, info.model_id, info.numerics_id) == ("prefill-1", "model-1", "numerics-1")
        assert info.layout.block_bytes == BLOCK_BYTES
        assert list(info.transports) == ["shm", "grpc"]
        assert (info.total_blocks, info.max_context, info.pid > 0) == (64, 512, True)


async def test_load_is_told_at_once_on_change_and_each_second() -> None:
    async with serving(chunk=4) as rig:
        rig.runner.hold()
        watch = rig.stub.WatchPrefillLoad(prefill_pb2.WatchPrefillLoadRequest())
        first = (await watch.read()).load
        assert (first.free_blocks, first.total_blocks, first.queued_prefill_tokens) == (64, 64, 0)
        call = asyncio.create_task(rig.prefill(rig.request(record_of(12, seed=1))))
        load = first
        while not load.running_sequences:
            load = (await watch.read()).load
        assert (load.queued_prefill_tokens, load.free_blocks) == (12, 61)
        started = asyncio.get_running_loop().time()
        await asyncio.wait_for(watch.read(), 5)
        assert asyncio.get_running_loop().time() - started > 0.5, "nothing changed: this is the heartbeat"
        rig.runner.free()
        await call
        while load.running_sequences or not load.prefill_tokens_per_second:
            load = (await watch.read()).load
        assert load.steps == 3
        watch.cancel()


async def test_backlog_is_told_in_seconds() -> None:
    """What waits by the rate of recent steps; nothing is known before the first."""
    async with serving(chunk=4) as rig:
        engine = rig.assembly.worker.engine
        rig.runner.hold()
        call = asyncio.create_task(rig.prefill(rig.request(record_of(12, seed=1))))
        await until(lambda: metric(rig.metrics, "tandem_queued_prefill_tokens") == 12)
        assert metric(rig.metrics, "tandem_queued_prefill_seconds") == 0
        rig.runner.permit()
        await until(lambda: engine.load.queued_prefill_tokens == 8)
        assert metric(rig.metrics, "tandem_prefill_tokens_per_second") == engine.prefill_rate > 0
        assert metric(rig.metrics, "tandem_queued_prefill_seconds") == 8 / engine.prefill_rate
        rig.runner.free()
        await call


async def test_load_is_told_at_most_twenty_times_a_second() -> None:
    async with serving() as rig:
        watch = rig.stub.WatchPrefillLoad(prefill_pb2.WatchPrefillLoadRequest())
        await watch.read()
        told = 0

        async def count() -> None:
            nonlocal told
            while True:
                await watch.read()
                told += 1

        counting = asyncio.create_task(count())
        started = asyncio.get_running_loop().time()
        for seed in range(40):
            await rig.prefill(rig.request(record_of(5, seed=seed)))
        seconds = asyncio.get_running_loop().time() - started
        counting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await counting
        assert 1 <= told <= 20 * seconds + 2
        watch.cancel()


async def test_a_stuck_engine_has_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "STEP_SECONDS", 0.6)
    async with serving() as rig:
        watch = rig.stub.WatchPrefillLoad(prefill_pb2.WatchPrefillLoadRequest())
        await watch.read()
        rig.runner.hold()
        call = rig.stub.Prefill(rig.request(record_of(12, seed=1)))
        assert (await call.read()).WhichOneof("event") == "accepted"
        await until(lambda: not rig.assembly.worker.engine.alive)
        load_read = asyncio.create_task(watch.read())
        while True:
            done, _ = await asyncio.wait({load_read}, timeout=1.5)
            if not done:
                break
            load_read = asyncio.create_task(watch.read())
            assert rig.assembly.worker.engine.steps == 1
        news = asyncio.create_task(call.read())
        done, _ = await asyncio.wait({news}, timeout=1.5)
        assert not done, "progress of an engine that doesn't turn"
        rig.runner.free()
        await asyncio.wait_for(load_read, 5)
        while (await asyncio.wait_for(news, 5)).WhichOneof("event") != "done":
            news = asyncio.create_task(call.read())
        watch.cancel()


async def test_a_long_step_silences_nobody() -> None:
    async with serving() as rig:
        rig.runner.hold()
        aboard = rig.stub.Prefill(rig.request(record_of(12, seed=1)))
        assert (await aboard.read()).WhichOneof("event") == "accepted"
        await until(rig.runner.waiting.is_set)
        waiting = rig.stub.Prefill(rig.request(record_of(12, seed=2)))
        for call in (aboard, aboard, waiting, waiting):
            assert (await asyncio.wait_for(call.read(), 3)).WhichOneof("event") == "progress"
        rig.runner.free()
        for call in (aboard, waiting):
            while (await asyncio.wait_for(call.read(), 5)).WhichOneof("event") != "done":
                pass


async def test_progress_comes_each_second() -> None:
    async with serving(chunk=4) as rig:
        rig.runner.hold()
        call = rig.stub.Prefill(rig.request(record_of(12, seed=1)))
        assert (await call.read()).WhichOneof("event") == "accepted"
        await until(rig.runner.waiting.is_set)
        rig.runner.permit()
        progress = [(await asyncio.wait_for(call.read(), 5)).progress for _ in range(3)]
        assert {(item.steps, item.computed_tokens) for item in progress[1:]} == {(2, 4)}
        rig.runner.free()
        while (await asyncio.wait_for(call.read(), 5)).WhichOneof("event") != "done":
            pass


async def test_metrics_have_the_names_of_the_field() -> None:
    async with serving(chunk=8) as rig:
        for _ in range(2):
            await rig.prefill(rig.request(record_of(20, seed=1)))
        await rig.settled()
        values = {
            "prompt_tokens_total": 40,
            "prompt_tokens_cached_total": 19,
            "prefix_cache_hits_total": 19,
            "prefix_cache_queries_total": 40,
            "generation_tokens_total": 2,
            "request_success_total": 2,
            "nixl_bytes_transferred_total": 10 * BLOCK_BYTES,
            "nixl_num_failed_transfers_total": 0,
            "nixl_num_kv_expired_reqs_total": 0,
            "time_to_first_token_seconds_count": 2,
            "request_queue_time_seconds_count": 2,
            "request_prefill_time_seconds_count": 2,
            "request_prompt_tokens_sum": 40,
            "iteration_tokens_total_sum": 21,
            "num_requests_running": 0,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0,
        }
        await until(lambda: metric(rig.metrics, "tandem_kv_cache_usage_perc") == 0)
        assert {name: metric(rig.metrics, f"tandem_{name}") for name in values} == values
