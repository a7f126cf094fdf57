"""Tokens that come on a worker's feed, beside everything else, which comes on the request's own stream."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from gateway_fakes import Cluster, FakeDecode, expected, text_of, tokens_of, until

from tandem.service.status import from_rpc_error
from tandem.v1 import types_pb2


async def test_tokens_come_on_the_feed(cluster: Cluster, serve: Any) -> None:
    await cluster.start()
    front = await serve()
    calls = [front.stream(tokens=8 + i, sampling=types_pb2.SamplingParams(n=1 + i % 2)) for i in range(6)]
    responses = await asyncio.gather(*(front.collect(call) for call in calls))
    for i, each in enumerate(responses):
        for index in range(1 + i % 2):
            assert tokens_of(each, index) == expected(8 + i, index)
        assert each[-1].end.timings.migrations == 0
    assert cluster.decode[0].fed == cluster.decode[0].tokens_sent > 0
    assert not front.gateway.pool.decode[0].feed._members


async def test_an_older_worker_sends_them_itself(cluster: Cluster, serve: Any) -> None:
    await cluster.start()
    cluster.decode[0].has_feeds = False
    front = await serve()
    assert front.gateway.pool.decode[0].feed.unknown
    assert tokens_of(await front.collect(front.stream())) == expected(8)
    assert cluster.decode[0].fed == 0


@pytest.mark.parametrize("prompt", [64, 4], ids=["remote", "local"])
async def test_the_stream_s_end_waits_for_the_feed(cluster: Cluster, serve: Any, prompt: int) -> None:
    """Finished and End are here before the last tokens: they tell how many there are."""
    await cluster.start()
    worker = cluster.decode[0]
    worker.feed_open.clear()
    front = await serve()
    call = front.stream(prompt=range(100, 100 + prompt))
    await until(lambda: worker.tokens_sent == 8 and worker.open == 0)
    worker.feed_open.set()
    responses = await front.collect(call)
    assert tokens_of(responses) == expected(8)
    assert responses[-1].end.timings.migrations == 0
    assert [r.WhichOneof("event") for r in responses[-2:]] == ["finished", "end"]


async def test_last_tokens_that_never_come(cluster: Cluster, serve: Any) -> None:
    """For no longer than a worker may be silent; then the record goes elsewhere."""
    await cluster.start(prefill=0, decode=2)
    for worker in cluster.decode:
        worker.feed_open.clear()
    front = await serve()
    call = front.stream()
    await until(lambda: any(worker.tokens_sent == 8 for worker in cluster.decode))
    for worker in cluster.decode:
        if not worker.tokens_sent:
            worker.feed_open.set()
    responses = await front.collect(call)
    assert tokens_of(responses) == expected(8)
    assert responses[-1].end.timings.migrations == 1


async def test_a_feed_that_ends_alone(cluster: Cluster, serve: Any) -> None:
    """Its requests go on from their records, here on the same worker, and a new feed takes its place."""
    await cluster.start(prefill=0)
    worker = cluster.decode[0]
    worker.feed_dies_after, worker.pause = 3, 0.02
    front = await serve()
    first = front.gateway.pool.decode[0].feed
    responses = await front.collect(front.stream(tokens=12))
    assert tokens_of(responses) == expected(12)
    assert responses[-1].end.timings.migrations == 1
    assert len(worker.records[1].outputs[0].token_ids) == 3
    await until(lambda: front.gateway.pool.decode[0].feed is not first and front.gateway.pool.decode[0].feed.ready)
    fed = worker.fed
    assert tokens_of(await front.collect(front.stream())) == expected(8)
    assert worker.fed == fed + 8
    await until(lambda: worker.open == 0 and len(worker.feeds) == 1)


async def test_a_stop_string_ends_the_choice_at_the_worker(cluster: Cluster, serve: Any) -> None:
    await cluster.start()
    worker = cluster.decode[0]
    worker.pause = 0.01
    front = await serve()
    whole = text_of(await front.collect(front.stream(tokens=20)))
    stop = whole[len(whole) // 2 :][:6]
    params = types_pb2.SamplingParams(n=2)
    responses = await front.collect(front.stream(tokens=20, sampling=params, stopping={"stop": [stop]}))
    assert text_of(responses) == whole[: whole.index(stop)]
    await until(lambda: worker.finishes == [0] or worker.open == 0)
    assert worker.finishes == [0]


async def test_cancelled_requests_leave_the_feed(cluster: Cluster, serve: Any) -> None:
    await cluster.start(prefill=0)
    cluster.decode[0].pause = 0.01
    front = await serve()
    call = front.stream(tokens=1000)
    await until(lambda: cluster.decode[0].fed > 3)
    call.cancel()
    await until(lambda: cluster.decode[0].open == 0)
    assert not front.gateway.pool.decode[0].feed._members
    assert tokens_of(await front.collect(front.stream())) == expected(8)


async def test_a_worker_that_dies_is_counted_though_its_feed_ends_first(cluster: Cluster, serve: Any) -> None:
    """The request was aboard two workers that died: it is taken for the cause, and the third never sees it."""
    await cluster.start(prefill=0, decode=3)
    dying: set[asyncio.Task[None]] = set()

    def mortal(worker: FakeDecode) -> Any:
        async def die(done: int, _context: Any) -> None:
            if done == 2:
                dying.add(asyncio.create_task(worker.stop()))
                await asyncio.Event().wait()

        return die

    for worker in cluster.decode:
        worker.misbehave = mortal(worker)  # type: ignore[method-assign]
    front = await serve()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream())
    assert from_rpc_error(caught.value).reason == "POISON_REQUEST"
    assert sorted(len(worker.records) for worker in cluster.decode) == [0, 1, 1]
    await asyncio.gather(*dying)


async def test_what_a_lost_worker_said_of_the_end_is_forgotten(cluster: Cluster, serve: Any) -> None:
    """It ended the output, but its feed broke before the last tokens: the next worker alone says where the end is."""
    await cluster.start(prefill=0)
    worker = cluster.decode[0]
    worker.feed_open.clear()
    worker.feed_dies_after = 0
    front = await serve()
    call = front.stream()
    await until(lambda: worker.tokens_sent == 8 and worker.open == 0)
    worker.feed_open.set()
    responses = await front.collect(call)
    assert tokens_of(responses) == expected(8)
    assert responses[-1].end.timings.migrations == 1
    assert responses[-1].end.timings.preemptions == 2, "each End was heard, and each tells one"
