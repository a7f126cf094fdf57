"""Workers that fail, and clients that don't notice."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import grpc
import pytest
from gateway_fakes import Cluster, expected, tokens_of, until
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from tandem.errors import OverloadedError, UnavailableError
from tandem.service.status import from_rpc_error
from tandem.v1 import decode_pb2, decode_pb2_grpc, types_pb2


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("others", [0, 1])
async def test_prefill_dies_before_the_commit(cluster: Cluster, serve: Any, phase: int, others: int) -> None:
    """Retarget to another P, or to D itself; tokens already given are sent along and come once."""
    await cluster.start()
    cluster.prefill[0].die_after = phase
    front = await serve()
    if others:
        healthy = await cluster.add_prefill()
        cluster.prefill[0].load.prefill_tokens_per_second = 1e6
        pool = front.gateway.pool
        pool.set_addresses([w.address for w in cluster.prefill], [cluster.decode[0].address])
        await front.until_ready(2, 1)
        await until(lambda: any(w.load.prefill_tokens_per_second for w in pool.prefill))
    responses = await front.collect(front.stream())
    assert tokens_of(responses) == expected(8)
    (retarget,) = cluster.decode[0].retargets
    assert retarget.attempt == 2
    assert [list(d.token_ids) for d in retarget.emitted] == ([expected(1)] if phase else [])
    assert responses[-1].end.timings.migrations == 1
    if others:
        assert retarget.source == decode_pb2.PREFILL_SOURCE_REMOTE
        assert [request.target.attempt for request in healthy.requests] == [2]
    else:
        assert retarget.source == decode_pb2.PREFILL_SOURCE_LOCAL
    await until(lambda: cluster.decode[0].open == 0)


async def test_retarget_answered_committed(cluster: Cluster, serve: Any) -> None:
    """P died after the commit, before it could say so: no new prefill runs."""
    await cluster.start(prefill=2)
    for worker in cluster.prefill:
        worker.die_after = 2
    cluster.decode[0].stream_pause_after = 0
    front = await serve()
    call = front.stream()
    await until(lambda: cluster.decode[0].retargets)
    cluster.decode[0].resume.set()
    assert tokens_of(await front.collect(call)) == expected(8)
    assert sum(len(worker.requests) for worker in cluster.prefill) == 1


async def test_prefill_refuses(cluster: Cluster, serve: Any) -> None:
    """RESOURCE_EXHAUSTED or DRAINING at P: another way is found, nobody is taken for dead."""
    await cluster.start()
    cluster.prefill[0].refuse = 1
    front = await serve()
    assert tokens_of(await front.collect(front.stream())) == expected(8)
    assert cluster.decode[0].retargets[0].source == decode_pb2.PREFILL_SOURCE_LOCAL
    assert front.gateway.pool.prefill[0].ready


async def test_the_decode_worker_s_failure_is_not_the_prefill_worker_s(cluster: Cluster, serve: Any) -> None:
    """P says that D could not be reached: P goes on getting work."""
    await cluster.start()

    async def target_lost(_done: int, _context: Any) -> None:
        error = UnavailableError("decode worker: gone", retry_after=0.0, reason="TARGET_LOST")
        error.metadata["side"] = "target"
        raise error

    cluster.prefill[0].misbehave = target_lost  # type: ignore[method-assign]
    front = await serve()
    blamed: list[bool] = []
    front.gateway.pool.prefill[0].failed = lambda: blamed.append(True)
    assert tokens_of(await front.collect(front.stream())) == expected(8)
    assert len(cluster.decode[0].retargets) == 1
    assert not blamed


@pytest.mark.parametrize("prompt", [64, 4], ids=["remote", "local"])
async def test_decode_overflows_after_it_admitted(cluster: Cluster, serve: Any, prompt: int) -> None:
    """The gateway read too slowly for D's bound: the record goes on elsewhere, wherever the prompt was computed."""
    await cluster.start(decode=2)
    faults = [True]

    async def overflow(done: int, _context: Any) -> None:
        if done >= 2 and faults:
            faults.pop()
            raise OverloadedError("too slow", retry_after=None, reason="SLOW_READER")

    for worker in cluster.decode:
        worker.misbehave = overflow  # type: ignore[method-assign]
    front = await serve()
    responses = await front.collect(front.stream(prompt=range(100, 100 + prompt)))
    assert tokens_of(responses) == expected(8)
    assert responses[-1].end.timings.migrations == 1


async def test_prefill_hangs(cluster: Cluster, serve: Any) -> None:
    """No heartbeat: replaced after three missed."""
    await cluster.start()
    cluster.prefill[0].hang_after = 1
    front = await serve()
    assert tokens_of(await front.collect(front.stream())) == expected(8)
    assert cluster.prefill[0].open == 0


@pytest.mark.parametrize("feeds", [False, True])
@pytest.mark.parametrize("failure", ["die_after", "hang_after", "drain_after"])
async def test_decode_fails_mid_stream(cluster: Cluster, serve: Any, failure: str, feeds: bool) -> None:
    """The record goes to another D: same tokens, none twice, no error."""
    await cluster.start(decode=2)
    for worker in cluster.decode:
        worker.has_feeds = feeds
    front = await serve()
    faults = ["one"]
    for worker in cluster.decode:
        setattr(worker, failure, 3)
        worker.faults = faults
    call = front.stream(sampling=types_pb2.SamplingParams(n=2))
    responses = await front.collect(call)
    assert [tokens_of(responses, i) for i in range(2)] == [expected(8, 0), expected(8, 1)]
    assert responses[-1].end.timings.migrations == 1
    second = max(cluster.decode, key=lambda worker: len(worker.records[0].outputs[0].token_ids))
    given = list(second.records[0].outputs[0].token_ids)
    assert given == expected(len(given))
    assert len(given) == 3 or (feeds and len(given) < 3), "what a feed still had on its way is computed again"


async def test_a_held_up_gateway_takes_no_worker_for_dead(cluster: Cluster, serve: Any) -> None:
    """It wakes to messages that wait for it: silence was its own."""
    await cluster.start()
    cluster.decode[0].stream_pause_after = 2
    front = await serve()
    call = front.stream()
    await until(lambda: cluster.decode[0].tokens_sent == 2)
    time.sleep(2.0)  # noqa: ASYNC251  # longer than `heartbeat_timeout`
    await asyncio.sleep(0.2)
    assert all(worker.ready for worker in (*front.gateway.pool.decode, *front.gateway.pool.prefill))
    cluster.decode[0].resume.set()
    responses = await front.collect(call)
    assert tokens_of(responses) == expected(8)
    assert responses[-1].end.timings.migrations == 0


async def test_decode_worker_that_no_message_reaches(cluster: Cluster, serve: Any) -> None:
    """The first write never gets through, as when a host is gone: the request moves on all the same."""
    await cluster.start(prefill=0, decode=2)
    cluster.decode[1].load.free_blocks = 500
    front = await serve()
    # The kernel takes connections; nobody ever answers.
    with socket.create_server(("127.0.0.1", 0)) as mute:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{mute.getsockname()[1]}")
        for worker in front.gateway.pool.decode:
            if worker.address == cluster.decode[0].address:
                worker.stub.Decode = decode_pb2_grpc.DecodeServiceStub(channel).Decode
        assert tokens_of(await front.collect(front.stream())) == expected(8)
        await channel.close()


def _undecodable(data: bytes) -> Any:
    raise ValueError(f"{len(data)} bytes of something else")


def _inconsistent(data: bytes) -> Any:
    """Log probabilities that lack their alternatives."""
    response = decode_pb2.DecodeResponse.FromString(data)
    _make_inconsistent(response.tokens.deltas)
    return response


def _inconsistent_feed(data: bytes) -> Any:
    response = decode_pb2.WatchTokensResponse.FromString(data)
    for tokens in response.requests:
        _make_inconsistent(tokens.deltas)
    return response


def _make_inconsistent(deltas: Any) -> None:
    for delta in deltas:
        delta.logprobs.CopyFrom(types_pb2.TokenLogprobs(token_logprobs=[-1.0], top_count=3))


@pytest.mark.parametrize("decoder", [_undecodable, _inconsistent])
async def test_a_worker_that_talks_nonsense(cluster: Cluster, serve: Any, decoder: Any) -> None:
    """INTERNAL at once: neither a hang until the deadline nor the client's fault."""
    await cluster.start(prefill=0)
    cluster.decode[0].has_feeds = False
    front = await serve()
    worker = front.gateway.pool.decode[0]
    worker.stub.Decode = worker.channel.stream_stream(
        "/tandem.v1.DecodeService/Decode",
        request_serializer=decode_pb2.DecodeRequest.SerializeToString,
        response_deserializer=decoder,
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream(timeout=5))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    await until(lambda: cluster.decode[0].open == 0)


async def test_a_feed_that_talks_nonsense_fails_the_request_it_is_about(cluster: Cluster, serve: Any) -> None:
    await cluster.start(prefill=0)
    front = await serve(wait_ready=False)
    (worker,) = front.gateway.pool.decode
    worker.stub.WatchTokens = worker.channel.unary_stream(
        "/tandem.v1.DecodeService/WatchTokens",
        request_serializer=decode_pb2.WatchTokensRequest.SerializeToString,
        response_deserializer=_inconsistent_feed,
    )
    await front.until_ready(0, 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream(timeout=5))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    await until(lambda: cluster.decode[0].open == 0)
    assert worker.feed is not None
    assert worker.feed.ready


async def test_a_full_queue_sends_nobody_away_who_had_begun(cluster: Cluster, serve: Any) -> None:
    """The only place for a request whose worker died is that queue."""
    await cluster.start(prefill=0, decode=2)
    first, second = cluster.decode
    for worker in cluster.decode:
        worker.info.max_sequences = 1
        worker.stream_pause_after = 1
        worker.faults = ["one"]
    front = await serve(max_queue=1)
    calls = [front.stream(), front.stream()]
    await until(lambda: first.tokens_sent == second.tokens_sent == 1)
    calls.append(front.stream())
    dispatcher = front.gateway.servicer._services.dispatcher
    waiting = asyncio.ensure_future(calls[2].initial_metadata())
    await until(lambda: dispatcher.waiting == 1)
    first.die_after = 2
    first.resume.set()
    await until(lambda: not first.faults)
    second.resume.set()
    for call in calls:
        assert tokens_of(await front.collect(call)) == expected(8)
    await waiting


async def test_decode_dies_while_prefill_runs(cluster: Cluster, serve: Any) -> None:
    """P's call for the dead D ends at once; a new pair serves."""
    await cluster.start(decode=2)
    cluster.prefill[0].hold.clear()
    front = await serve()
    call = front.stream()
    await until(lambda: cluster.prefill[0].open == 1)
    dead = next(worker for worker in cluster.decode if worker.records)
    await dead.stop()
    await until(lambda: len(cluster.prefill[0].requests) == 2)
    cluster.prefill[0].hold.set()
    assert tokens_of(await front.collect(call)) == expected(8)
    assert cluster.prefill[0].requests[0].target.address == dead.address


async def test_poison_request(cluster: Cluster, serve: Any) -> None:
    """Aboard two workers that died: INTERNAL, and the third is spared."""
    await cluster.start(prefill=0, decode=3)
    for worker in cluster.decode:
        worker.die_after, worker.dies_for_good = 1, True
    front = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream())
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert from_rpc_error(caught.value).reason == "POISON_REQUEST"
    registry = front.gateway.metrics.registry
    assert registry.get_sample_value("tandem_request_failure_total", {"role": "gateway", "code": "INTERNAL"}) == 1
    assert sorted(len(worker.records) for worker in cluster.decode) == [0, 1, 1]


async def test_decode_refuses_then_takes(cluster: Cluster, serve: Any) -> None:
    """Refused at admission is no failure: the request waits and is asked again."""
    await cluster.start()
    cluster.decode[0].refuse = 3
    front = await serve()
    responses = await front.collect(front.stream())
    assert tokens_of(responses) == expected(8)
    assert responses[-1].end.timings.migrations == 0


async def test_worker_comes_back(cluster: Cluster, serve: Any) -> None:
    """With no worker left the request waits for one."""
    await cluster.start(prefill=0)
    old = cluster.decode[0]
    old.die_after = old.stream_pause_after = 3
    front = await serve()
    call = front.stream()
    responses: list[Any] = []
    while tokens_of(responses) != expected(3):  # what is still on its way when the worker dies may be lost
        responses.append(await call.read())
    new = await cluster.add_decode()
    front.gateway.pool.set_addresses([], [new.address])
    old.resume.set()
    assert tokens_of(responses + await front.collect(call)) == expected(8)
    assert list(new.records[0].outputs[0].token_ids) == expected(3)


async def test_no_worker_at_all(cluster: Cluster, serve: Any) -> None:
    """UNAVAILABLE with RetryInfo, after the grace."""
    await cluster.start(prefill=0)
    front = await serve()
    await cluster.decode[0].stop()
    await until(lambda: not front.gateway.pool.serving)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream())
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    kinds = [detail.TypeName() for detail in rpc_status.from_call(caught.value).details]
    assert error_details_pb2.RetryInfo.DESCRIPTOR.full_name in kinds


async def test_migration_needs_the_same_numerics(cluster: Cluster, serve: Any) -> None:
    """A worker that computes other bits never continues a stream."""
    await cluster.start(prefill=0)
    await cluster.add_decode(numerics_id="bf16")
    for worker in cluster.decode:
        worker.die_after, worker.dies_for_good = 2, True
    front = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream())
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert sorted(len(worker.records) for worker in cluster.decode) == [0, 1]
