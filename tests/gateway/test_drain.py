"""A gateway that drains: what runs goes on, probes are told, and clients find another."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from gateway_fakes import Cluster, expected, tokens_of, until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.client import AsyncClient, Delta
from tandem.service.channel import open_channel

Status = health_pb2.HealthCheckResponse


def _healthz(address: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{address}/healthz", timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


async def test_health_says_no_while_draining(cluster: Cluster, serve: Any) -> None:
    """To probes over gRPC and HTTP, from the start of the drain, whatever workers report; and it lives."""
    await cluster.start(prefill=0)
    worker = cluster.decode[0]
    worker.stream_pause_after = 1
    front = await serve(bindings={"health": "127.0.0.1:0"})
    call = front.stream()
    await until(lambda: worker.tokens_sent == 1)
    draining = asyncio.create_task(front.gateway._drain(10))
    await asyncio.sleep(0.3)  # several load reports
    async with open_channel(front.gateway.shell.health_address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service, status in (("", Status.NOT_SERVING), ("liveness", Status.SERVING)):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == status
    assert await asyncio.to_thread(_healthz, front.gateway.http_address) == 503
    worker.resume.set()
    assert tokens_of(await front.collect(call)) == expected(8)
    await draining


async def test_whoever_watches_health_is_told_of_the_drain(cluster: Cluster, serve: Any) -> None:
    """On the port of the API too, though that takes no new calls then."""
    await cluster.start(prefill=0)
    front = await serve()
    watch = health_pb2_grpc.HealthStub(front.channel).Watch(health_pb2.HealthCheckRequest())
    while (await watch.read()).status != Status.SERVING:
        pass
    front.gateway.shell.request_stop()
    running = asyncio.create_task(front.gateway.run(10))
    assert (await watch.read()).status == Status.NOT_SERVING
    assert await asyncio.wait_for(running, 10) == 0


@asynccontextmanager
async def _service(targets: list[str]) -> AsyncIterator[str]:
    """An address that leads each new connection to the gateway that is in `targets` then, as a Service does."""
    tasks: list[asyncio.Task[None]] = []

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(1 << 16):
                    writer.write(data)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = targets[0].rpartition(":")
        back, there = await asyncio.open_connection(host, int(port))
        tasks.extend(asyncio.create_task(copy(*ends)) for ends in ((reader, there), (back, writer)))

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_who_calls_a_service_finds_another_gateway(cluster: Cluster, serve: Any) -> None:
    """By a new connection: the old one would lead to the one that drains for as long as a stream runs there."""
    await cluster.start(prefill=0)
    cluster.decode[0].pause = 0.03
    leaving, staying = await serve(), await serve()
    targets, tokens = [leaving.gateway.address], []
    async with _service(targets) as address, AsyncClient(address) as client:
        async with client.stream(token_ids=range(100, 164), max_tokens=80) as events:
            async for event in events:
                if not isinstance(event, Delta):
                    continue
                tokens += event.token_ids
                if targets[0] == leaving.gateway.address:
                    targets[0] = staying.gateway.address
                    draining = asyncio.create_task(leaving.gateway._drain(30))
                    await until(lambda: leaving.gateway.servicer.draining)
                    answer = await client.generate(token_ids=range(50, 90), max_tokens=4)
                    assert list(answer.token_ids) == expected(4)
                    assert not draining.done()
        await draining
    assert tokens == expected(80)
