"""The queue by itself, and the gauges of who waits and who runs."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from gateway_fakes import Cluster, until

from gateway import text as texts
from gateway.affinity import Prefix
from gateway.config import GatewayConfig
from gateway.dispatch import Dispatcher
from gateway.pairing import Need, Pair
from gateway.pool import WorkerPool
from gateway.text import TextService
from gateway.tokenizer import Tokenizer
from tandem.errors import OverloadedError


async def test_credit_is_given_out_while_another_worker_pauses() -> None:
    worker: Any = SimpleNamespace(paused_until=asyncio.get_running_loop().time() + 60, take=lambda *_: None)
    listeners: list[Any] = []
    pool: Any = SimpleNamespace(prefill=[], decode=[worker], on_change=listeners.append)
    pairing: Any = SimpleNamespace(choose=lambda *_: None, candidates=lambda _: [worker])
    dispatcher = Dispatcher(pool, pairing, GatewayConfig())
    waiting = asyncio.create_task(dispatcher.acquire(Need(8, 1, Prefix([])), priority=0, arrival=0.0))
    await asyncio.sleep(0.05)
    pairing.choose = lambda *_: Pair(worker, None)
    listeners[0]()
    done, _ = await asyncio.wait({waiting}, timeout=0.3)
    assert done, "it waits for the pause of a worker that it doesn't need"
    assert (await waiting).decode is worker


async def test_a_pool_that_closes_ends_workers_that_left_with_requests_aboard_too() -> None:
    pool = WorkerPool()
    pool.set_addresses([], ["127.0.0.1:1"])
    (worker,) = pool.decode
    worker.take(1, 8, Prefix([]))
    pool.set_addresses([], [])
    await pool.close()
    assert worker.channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN


async def test_a_request_that_waits_does_not_count_as_running(cluster: Cluster, serve: Any) -> None:
    await cluster.add_prefill()
    await cluster.add_decode(max_sequences=1)
    cluster.prefill[0].hold.clear()
    front = await serve()
    metrics = front.gateway.metrics

    def counts() -> tuple[float, float]:
        registry, labels = metrics.registry, {"role": "gateway"}
        names = ("tandem_num_requests_running", "tandem_num_requests_waiting")
        running, waiting = (registry.get_sample_value(name, labels) for name in names)
        return running, waiting

    calls = [asyncio.ensure_future(front.collect(front.stream())) for _ in range(2)]
    await until(lambda: counts() == (1, 1))
    cluster.prefill[0].hold.set()
    await asyncio.gather(*calls)
    await until(lambda: counts() == (0, 0))


async def test_texts_that_wait_for_a_thread_are_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_WAITING", 1)
    service, go = TextService(tokenizer), threading.Event()
    monkeypatch.setattr(service, "_encode", lambda *_: [go.wait(10)])
    long = "x" * (texts.INLINE_CHARACTERS + 1)
    calls = [asyncio.create_task(service.encode(long)) for _ in range(texts.THREADS + 1)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await service.encode(long)
    go.set()
    await asyncio.gather(*calls)
    assert await service.encode(long)
    service.close()
