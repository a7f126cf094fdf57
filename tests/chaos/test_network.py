"""Networks that fail between any two processes, and clients that don't notice."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import replace
from typing import Any

import grpc
import pytest
from chaos_proxy import Proxy
from small_cluster import PATIENCE, Small, expected

from tandem.client import AsyncClient, Delta, End
from tandem.errors import UnavailableError
from tandem.service.channel import channel_options
from tandem.service.server import server_options

TOKENS = 24


def _prompt(number: int, length: int = 600) -> list[int]:
    return [(number * 7919 + i * 31) % 40_000 + 300 for i in range(length)]


async def _stream(cluster: Small, number: int, seen: list[int], moves: list[int]) -> list[int]:
    """One request's tokens; `seen` grows with them. `moves` gets how often it moved to another worker."""
    async with AsyncClient(addresses=[gateway.address for gateway in cluster.gateways]) as client:
        async for event in client.stream(
            token_ids=_prompt(number), seed=number, max_tokens=TOKENS, ignore_eos=True, timeout=40
        ):
            if isinstance(event, Delta):
                seen += event.token_ids
            elif isinstance(event, End):
                moves.append(event.timings.migrations)
    return seen


async def _streams(
    cluster: Small, count: int = 6, moves: list[int] | None = None
) -> tuple[list[list[int]], asyncio.Future[Any]]:
    """Several, and what each has seen."""
    moves = [] if moves is None else moves
    seen: list[list[int]] = [[] for _ in range(count)]
    return seen, asyncio.gather(*(_stream(cluster, number, seen[number], moves) for number in range(count)))


def _check(answers: list[list[int]]) -> None:
    for number, answer in enumerate(answers):
        assert answer == expected(_prompt(number), number, TOKENS)


@pytest.mark.parametrize("fault", ["cut", "stall"])
@pytest.mark.parametrize("moment", ["prefill", "decode"])
@pytest.mark.parametrize("link", ["prefill", "decode"])
async def test_a_gateway_loses_a_worker_s_link(start_small: Any, link: str, moment: str, fault: str) -> None:
    """While prompts are computed, or while tokens come: same tokens, no error, and nothing is held anywhere."""
    cluster = await start_small()
    for each in cluster.prefill if moment == "prefill" else cluster.decode:
        each.runner.pace = 0.05
    seen, streams = await _streams(cluster)
    victims = cluster.prefill if link == "prefill" else cluster.decode
    if moment == "prefill":
        await cluster.until(lambda: any(each.worker.open_calls for each in cluster.prefill))
        victim = max(victims, key=lambda each: each.worker.open_calls)
    else:
        await cluster.until(lambda: min(map(len, seen)) >= 3)
        victim = max(victims, key=lambda each: each.worker.open_calls)
    getattr(victim.proxy, fault)()
    _check(await streams)
    victim.proxy.resume()
    await cluster.settled()


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_transfers_are_cut(start_small: Any, transport: str) -> None:
    """P can't send any more: another attempt, by another P or by D itself."""
    cluster = await start_small(transports=("shm", "grpc") if transport == "shm" else ("grpc",))
    for each in cluster.prefill:
        each.runner.pace = 0.05
    _seen, streams = await _streams(cluster)
    await cluster.until(lambda: all(proxy.connections for proxy in cluster.transfers.values()))
    for proxy in cluster.transfers.values():
        proxy.cut()
    _check(await streams)
    await cluster.settled()


async def test_a_slow_network(start_small: Any) -> None:
    """Slower than the prompt is computed: everything takes its time, nobody is taken for dead."""
    cluster = await start_small(prefill=1, decode=1, transports=("grpc",))
    for proxy in cluster.transfers.values():
        proxy.bytes_per_second = 40_000
    moves: list[int] = []
    _seen, streams = await _streams(cluster, 4, moves)
    _check(await streams)
    assert moves == [0] * 4
    await cluster.settled()


async def test_bytes_that_change_on_the_way(start_small: Any) -> None:
    """The checksum finds them, and the request is computed again: it completes, with the right tokens."""
    cluster = await start_small(prefill=1, decode=1, transports=("grpc",))
    (proxy,) = cluster.transfers.values()
    prompt = _prompt(0)
    # As the fake engine keeps token 100 in its block: (token, position + 1).
    kept = struct.pack("<II", prompt[100], 101)
    hits = []

    def corrupt(data: bytes) -> bytes:
        if kept in data and not hits:
            hits.append(True)
            return data.replace(kept, struct.pack("<II", prompt[100] ^ 1, 101))
        return data

    proxy.corrupt = corrupt
    assert await _stream(cluster, 0, [], []) == expected(prompt, 0, TOKENS)
    assert hits
    failed = cluster.decode[0].metrics.registry.get_sample_value(
        "tandem_nixl_num_failed_transfers_total", {"role": "decode"}
    )
    assert failed == 1
    await cluster.settled()


async def test_a_gateway_is_lost(start_small: Any) -> None:
    """What it held on workers is free at once; its streams go on at the other, where they left off."""
    cluster = await start_small(gateways=2)
    for each in cluster.decode:
        each.runner.pace = 0.02
    seen, streams = await _streams(cluster)
    await cluster.until(lambda: min(map(len, seen)) >= 3)
    await cluster.gateways[0].shell.server.stop(0)
    _check(await streams)
    assert cluster.gateways[0].pool.decode[0].outstanding == 0
    await cluster.settled()


async def test_a_gateway_that_nobody_can_reach_any_more(start_small: Any) -> None:
    """Its connections to workers break: every block is free, though nobody ended a request."""
    cluster = await start_small(prefill=1, decode=1)
    cluster.decode[0].runner.pace = 0.05
    seen, streams = await _streams(cluster)
    await cluster.until(lambda: min(map(len, seen)) >= 3)
    for each in cluster.workers:
        each.proxy.target = ""
        each.proxy.cut()
    await cluster.settled()
    streams.cancel()
    await asyncio.gather(streams, return_exceptions=True)


async def test_a_full_decode_pool_queues_in_the_gateway(start_small: Any) -> None:
    """Decode's credit decides how much prefill starts: prefill workers hold nothing that decode has no room for."""
    cluster = await start_small(prefill=2, decode=1, sequences=2)
    cluster.decode[0].runner.pace = 0.01
    dispatcher = cluster.gateways[0].servicer._services.dispatcher
    most = [0, 0]
    _seen, streams = await _streams(cluster, 8)
    while not streams.done():
        most[0] = max(most[0], sum(each.worker.open_calls for each in cluster.prefill))
        most[1] = max(most[1], dispatcher.waiting)
        await asyncio.sleep(0.002)
    _check(await streams)
    assert most[0] <= 2, "prefill ran ahead of decode's credit"
    assert most[1] >= 5
    await cluster.settled()


async def test_a_decode_pool_without_blocks_deadlocks_nobody(start_small: Any) -> None:
    """Room for one prompt and a half: they go one after the other, and prefill blocks stay free meanwhile."""
    cluster = await start_small(prefill=2, decode=1, blocks=64)
    _seen, streams = await _streams(cluster, 6)
    _check(await streams)
    await cluster.settled()


async def test_transfers_stall(start_small: Any) -> None:
    """P and D live, but what one sends the other doesn't get: three missed heartbeats, and D computes the rest."""
    cluster = await start_small(prefill=1, decode=1)
    cluster.prefill[0].runner.pace = 0.05
    _seen, streams = await _streams(cluster, 2)
    (proxy,) = cluster.transfers.values()
    await cluster.until(lambda: proxy.connections)
    proxy.stall()
    _check(await streams)
    proxy.resume()
    await cluster.settled()


def _twenty_times_as_fast(options: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    waits = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    pings = "grpc.http2.min_ping_interval_without_data_ms"
    return [(name, value // 20 if name in (*waits, pings) else value) for name, value in options]


async def test_a_peer_that_is_gone_without_a_word_is_found_out() -> None:
    """By our options of channels and servers, on both sides: a quiet stream ends soon after its network does."""
    ended = asyncio.Event()

    async def quiet(_request: bytes, context: Any) -> None:
        await context.write(b"here")
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    handler = grpc.unary_stream_rpc_method_handler(quiet)
    server = grpc.aio.server(options=_twenty_times_as_fast(server_options()))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"quiet": handler}),))
    proxy = Proxy(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    options = _twenty_times_as_fast(channel_options(await proxy.start()))
    async with grpc.aio.insecure_channel(proxy.address, options=options) as channel:
        call = channel.unary_stream("/test/quiet")(b"")
        assert await call.read() == b"here"
        proxy.stall()
        async with asyncio.timeout(10):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            await ended.wait()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    await server.stop(0)
    await proxy.close()


async def test_a_pool_of_one_comes_back(start_small: Any) -> None:
    """While its only decode worker can't be reached: UNAVAILABLE with a time to try again. Then it serves again."""
    cluster = await start_small(prefill=1, decode=1, patience=replace(PATIENCE, no_worker_grace=0.5))
    (decode,) = cluster.decode
    target, decode.proxy.target = decode.proxy.target, ""
    decode.proxy.cut()
    async with AsyncClient(cluster.gateways[0].address, tries=1) as client:
        with pytest.raises(UnavailableError) as caught:
            await client.generate(token_ids=_prompt(0), max_tokens=4, timeout=20)
        assert (caught.value.reason, caught.value.retry_after) == ("NO_WORKER", 2.0)
        decode.proxy.target = target
        answer = await client.generate(token_ids=_prompt(0), seed=0, max_tokens=4, ignore_eos=True, timeout=20)
    assert list(answer.token_ids) == expected(_prompt(0), 0, 4)
    await cluster.settled()


@pytest.mark.parametrize("decode", [2, 1])
async def test_a_network_that_breaks_again_and_again_makes_no_poison(start_small: Any, decode: int) -> None:
    """Links to every decode worker break under one request. They live, so that it can't have killed them, and where
    nobody else is left it goes on where it was.
    """
    cluster = await start_small(prefill=1, decode=decode)
    for each in cluster.decode:
        each.runner.pace = 0.05
    seen: list[int] = []
    moves: list[int] = []
    stream = asyncio.ensure_future(_stream(cluster, 0, seen, moves))
    pool = cluster.gateways[0].pool
    for enough in (3, 6, 9):
        await cluster.until(lambda enough=enough: len(seen) >= enough)
        await cluster.until(lambda: all(worker.ready for worker in pool.decode))
        busy = max(cluster.decode, key=lambda each: each.worker.open_calls)
        busy.proxy.cut()
        await cluster.until(lambda busy=busy: not busy.worker.open_calls)
    _check([await stream])
    assert moves == [3], "the gateway did it, not the client"
    await cluster.settled()
