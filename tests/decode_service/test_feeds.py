"""Feeds of the decode worker: their buffer, and over real sockets beside Decode streams."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import pytest
from decode_rig import INCARNATION, Call, Output, Rig, eventually, expected_tokens, read_raw, record_of, running_rig

from decode_service.feeds import MAX_FEEDS, Feed, Feeds
from tandem.errors import DrainingError, InvalidRequestError, OverloadedError
from tandem.record import TokenDelta
from tandem.v1 import decode_pb2


def delta(*ids: int, position: int = 0) -> TokenDelta:
    return TokenDelta(0, position, list(ids))


async def test_a_feed_gathers_what_waits() -> None:
    feed = Feed(limit=10)
    feed.put(1, [delta(1, 2)])
    feed.put(2, [delta(5)])
    feed.put(1, [delta(3, position=2)])
    assert await feed.get() == {1: [delta(1, 2, 3)], 2: [delta(5)]}
    waiting = asyncio.ensure_future(feed.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    feed.put(3, [delta(9)])
    assert await waiting == {3: [delta(9)]}


async def test_a_closed_feed_gives_what_waits_first() -> None:
    feed = Feed()
    feed.put(1, [delta(1)])
    feed.close(DrainingError("first"))
    feed.close(DrainingError("second"))
    feed.put(2, [delta(2)])
    assert not feed.open
    assert await feed.get() == {1: [delta(1)]}
    for _ in range(2):
        with pytest.raises(DrainingError, match="first"):
            await feed.get()
        feed.close(DrainingError("third"))


async def test_a_full_feed_fails() -> None:
    feed = Feed(limit=3)
    feed.put(1, [delta(1, 2, 3)])
    assert feed.open
    feed.put(2, [delta(4)])
    with pytest.raises(OverloadedError) as caught:
        await feed.get()
    assert caught.value.reason == "SLOW_READER"
    assert feed.overflowed.exception() is caught.value


async def test_feeds_have_names() -> None:
    feeds = Feeds()
    with feeds.opened("a") as feed:
        assert feeds.get("a") is feed
        assert feeds.get("b") is None
        for bad in ("a", "", "x" * 65):
            with pytest.raises(InvalidRequestError, match="feed_id"), feeds.opened(bad):
                pass
        with contextlib.ExitStack() as many:
            for number in range(MAX_FEEDS - 1):
                many.enter_context(feeds.opened(f"feed {number}"))
            with pytest.raises(OverloadedError, match="most"):
                many.enter_context(feeds.opened("one more"))
        feeds.close(DrainingError("over"))
        assert feeds.get("a") is None
    with feeds.opened("a") as again:
        assert again is not feed


class Watch:
    """A fake gateway's side of a feed."""

    def __init__(self, rig: Rig, feed_id: str = "feed", incarnation: str = INCARNATION) -> None:
        request = decode_pb2.WatchTokensRequest(feed_id=feed_id, incarnation=incarnation)
        self.call: Any = rig.decode.WatchTokens(request)
        self.outputs: dict[int, Output] = {}

    async def open(self) -> Watch:
        assert not (await self.call.read()).requests
        return self

    async def read(self) -> bool:
        """Takes one message; False at the end."""
        response = await read_raw(self.call)
        if response is grpc.aio.EOF:
            return False
        for tokens in response.requests:
            message = decode_pb2.DecodeResponse(tokens=decode_pb2.DecodeTokens(deltas=tokens.deltas))
            self.outputs.setdefault(tokens.number, Output()).take(message)
        return True

    async def read_until(self, counts: dict[int, int]) -> None:
        while any(len(self.ids(number)) < count for number, count in counts.items()):
            assert await self.read()

    def ids(self, number: int) -> list[int]:
        return self.outputs[number].ids() if number in self.outputs else []


def on_feed(call: Call, number: int, feed_id: str = "feed") -> Call:
    call.start.feed_id, call.start.feed_number = feed_id, number
    return call


async def test_tokens_on_the_feed_and_the_rest_on_the_streams() -> None:
    async with running_rig() as rig:
        watch = await Watch(rig).open()
        records = [record_of(6 + i, max_tokens=9 + i, seed=i) for i in range(4)]
        calls = [await on_feed(Call(rig, record, local=True), i).open() for i, record in enumerate(records)]
        plain = await rig.call(record_of(9, max_tokens=5, seed=9))
        for call, record in zip(calls, records, strict=True):
            output = await call.read_to_end()
            assert not output.tokens
            assert output.counts == {0: record.stopping.max_tokens}
        await watch.read_until({i: 9 + i for i in range(4)})
        assert [watch.ids(i) for i in range(4)] == [expected_tokens(record) for record in records]
        assert (await plain.read_to_end()).ids() == expected_tokens(plain.record)
        watch.call.cancel()
        await rig.all_free()


async def test_when_the_feed_is_gone_the_stream_carries_tokens() -> None:
    async with running_rig(pace=0.002, num_blocks=256) as rig:
        watch = await Watch(rig).open()
        call = await on_feed(Call(rig, record_of(8, max_tokens=400), local=True), 7).open()
        await watch.read_until({7: 5})
        watch.call.cancel()
        output = await call.read_to_end()
        whole = expected_tokens(call.record)
        rest = output.ids()
        assert 0 < len(rest) < 400
        assert rest == whole[-len(rest) :]
        await rig.all_free()


async def test_a_feed_that_nobody_opened() -> None:
    async with running_rig() as rig:
        call = await on_feed(Call(rig, record_of(8, max_tokens=6), local=True), 1, "nobody").open()
        assert (await call.read_to_end()).ids() == expected_tokens(call.record)


@pytest.mark.parametrize(
    ("feed_id", "incarnation", "code"),
    [
        ("", INCARNATION, grpc.StatusCode.INVALID_ARGUMENT),
        ("feed", INCARNATION, grpc.StatusCode.INVALID_ARGUMENT),
        ("other", "an earlier life", grpc.StatusCode.ABORTED),
    ],
)
async def test_feeds_that_are_refused(feed_id: str, incarnation: str, code: grpc.StatusCode) -> None:
    async with running_rig() as rig:
        first = await Watch(rig).open()
        refused = Watch(rig, feed_id, incarnation)
        assert not await refused.read()
        assert await refused.call.code() is code
        assert not first.call.done()


async def test_a_cancelled_request_sends_nothing_more_on_the_feed() -> None:
    async with running_rig(pace=0.002, num_blocks=256) as rig:
        watch = await Watch(rig).open()
        call = await on_feed(Call(rig, record_of(8, max_tokens=400), local=True), 1).open()
        await watch.read_until({1: 3})
        call.call.cancel()
        await rig.all_free()
        last = await on_feed(Call(rig, record_of(8, max_tokens=3), local=True), 2).open()
        await last.read_to_end()
        await watch.read_until({2: 3})
        assert len(watch.ids(1)) < 400


async def test_a_drain_lets_the_feed_deliver_and_ends_it() -> None:
    async with running_rig(pace=0.002) as rig:
        watch = await Watch(rig).open()
        call = await on_feed(Call(rig, record_of(8, max_tokens=40), local=True), 1).open()
        await watch.read_until({1: 2})
        drain = asyncio.ensure_future(rig.assembly.worker.drain(10))
        await eventually(lambda: rig.assembly.worker.draining)
        late = Watch(rig, "late")
        assert not await late.read()
        assert await late.call.code() is grpc.StatusCode.UNAVAILABLE
        await call.read_to_end()
        while await watch.read():
            pass
        assert watch.ids(1) == expected_tokens(call.record)
        assert await watch.call.code() is grpc.StatusCode.UNAVAILABLE
        await drain
