"""What the gateway knows of each worker.

Life cycle of a `Worker`: made for an address -> `watch()` runs for as long as the address is listed: connects, asks
what it is, follows its load reports (ready), and begins again when they stop (not ready) -> `close()` once nothing
runs there. A restarted worker has a new incarnation and a new memory.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc

from gateway.affinity import Prefix, PrefixMemory
from gateway.breaker import Breaker, Ejecting
from gateway.feed import TokenFeed
from gateway.fit import traits_of
from tandem.service.channel import open_service_channel
from tandem.service.logging import get_logger
from tandem.service.silence import Silence
from tandem.service.tls import Tls
from tandem.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2

_log = get_logger(__name__)

INFO_TIMEOUT = 3.0
RETRY_PAUSE = 0.2
OLD_CHANNEL_SECONDS = 3600.0
"""Most that calls on a channel with an earlier certificate may go on."""
MOST_REASONS = 8
FEED_PAUSE = 0.5
"""Least seconds between two feeds of one worker."""


class Worker:
    """One worker process behind one address."""

    def __init__(
        self,
        role: str,
        address: str,
        changed: Callable[[], None],
        *,
        silence: float = 3.0,
        tls: Tls | None = None,
        ejecting: Ejecting | None = None,
        may_eject: Callable[[Worker], bool] = lambda _: False,
    ) -> None:
        """`role` is prefill or decode; `changed` is called after every change; `silence` in seconds; `may_eject` is
        asked before a worker that failed again and again gets nothing new for a while.
        """
        self.role, self.address = role, address
        self._changed, self._silence = changed, silence
        self._tls = tls
        self.breaker = Breaker(ejecting or Ejecting(), lambda: asyncio.get_running_loop().time())
        self._may_eject = may_eject
        self._wake: asyncio.TimerHandle | None = None
        self.failures = 0
        """Requests that failed there, by the worker's fault."""
        self._closing: set[asyncio.Task[None]] = set()
        self._told: set[str] = set()
        """Why it can't be reached, as far as that was logged."""
        self._connect()
        self.info = types_pb2.WorkerInfo()
        self.traits = traits_of(self.info)
        self.load = types_pb2.WorkerLoad()
        self.memory = PrefixMemory()
        self.connected = False
        self.draining = False
        self.paused_until = 0.0
        self.outstanding = 0
        """Sequences that this gateway runs there."""
        self.idle = asyncio.Event()
        self.idle.set()
        self.pending_tokens = 0
        self.pending_blocks = 0
        """What was sent since the last load report."""
        self._foreign = 0
        self.feed: TokenFeed | None = None
        """Of a decode worker, once it was opened."""
        self._next_feed = 0.0
        self._feed_tasks: set[asyncio.Task[None]] = set()

    def _connect(self) -> None:
        """A channel with the certificate of this moment. Nothing is sent yet."""
        certificate = self._tls.version if self._tls is not None else 0
        self.channel = open_service_channel(self.address, self.role, self._tls)
        self.stub: Any = (
            prefill_pb2_grpc.PrefillServiceStub(self.channel)
            if self.role == "prefill"
            else decode_pb2_grpc.DecodeServiceStub(self.channel)
        )
        self._certificate = certificate

    def _reconnect(self) -> None:
        """A channel begins each connection with the certificate that it was made with: with a renewed one another
        channel is needed. The old one ends with the calls on it.
        """
        if self._tls is None or self._tls.version == self._certificate:
            return
        old = self.channel
        self._connect()
        task = asyncio.create_task(_close_after_calls(old), name=f"old channel to {self.address}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        # New requests get a feed of the new channel; those aboard the old one's stay there.
        self.feed, self._next_feed = None, 0.0

    @property
    def ready(self) -> bool:
        """True when it may get new work."""
        return self.connected and not self.draining and self.breaker.ready

    @property
    def running(self) -> int:
        """Sequences there, those of other gateways included."""
        return self.outstanding + self._foreign

    async def watch(self) -> None:
        """Follows the worker until cancelled."""
        while True:
            try:
                self._reconnect()
                await self._follow()
            except Exception as exc:  # whatever it was: a watch that ends would never see the worker again
                self._tell(_reason(exc))
            self._set_connected(False)
            await asyncio.sleep(RETRY_PAUSE)

    def _tell(self, reason: str) -> None:
        """Logs a loss, and why it isn't reached then: each reason once, until it is there again."""
        if self.connected:
            _log.warning("worker lost", worker_role=self.role, address=self.address, reason=reason)
        elif reason not in self._told and len(self._told) < MOST_REASONS:
            _log.warning("worker can't be reached", worker_role=self.role, address=self.address, reason=reason)
        self._told.add(reason)

    async def _follow(self) -> None:
        async with asyncio.timeout(INFO_TIMEOUT):
            await self._ask_info()
        if self.role == "prefill":
            call = self.stub.WatchPrefillLoad(prefill_pb2.WatchPrefillLoadRequest())
        else:
            call = self.stub.WatchDecodeLoad(decode_pb2.WatchDecodeLoadRequest())
        try:
            async with Silence(self._silence) as silence:
                async for response in call:
                    silence.heard()
                    self._on_load(response.load)
        finally:
            call.cancel()

    async def _ask_info(self) -> None:
        if self.role == "prefill":
            response = await self.stub.GetPrefillInfo(prefill_pb2.GetPrefillInfoRequest(), timeout=INFO_TIMEOUT)
        else:
            response = await self.stub.GetDecodeInfo(decode_pb2.GetDecodeInfoRequest(), timeout=INFO_TIMEOUT)
        if response.info.incarnation != self.info.incarnation:
            self.memory = PrefixMemory(response.info.layout.block_size)
            self.traits = traits_of(response.info)
            self.paused_until = 0.0
            self.breaker.close()
        self.info = response.info

    def _on_load(self, load: types_pb2.WorkerLoad) -> None:
        self.load = load
        self.draining = load.draining
        reported = load.running_sequences + load.receiving_requests + load.waiting_requests
        self._foreign = max(0, reported - self.outstanding)
        self.pending_tokens = self.pending_blocks = 0
        self._keep_feed()
        self._set_connected(True)

    def _keep_feed(self) -> None:
        """Opens a feed for this incarnation, and another when it ended. A feed outlives the watch: requests do."""
        if self.role != "decode" or self.draining:
            return
        feed, now = self.feed, asyncio.get_running_loop().time()
        if feed is not None and feed.incarnation == self.info.incarnation and (not feed.over or feed.unknown):
            return
        if now >= self._next_feed:
            self._next_feed = now + FEED_PAUSE
            self.feed = TokenFeed(self.stub, self.info.incarnation)
            task = asyncio.create_task(self.feed.run(), name=f"token feed of {self.address}")
            self._feed_tasks.add(task)
            task.add_done_callback(self._feed_tasks.discard)

    def _set_connected(self, connected: bool) -> None:
        if connected and not self.connected:
            _log.info("worker ready", worker_role=self.role, address=self.address, incarnation=self.info.incarnation)
        if connected:
            self._told.clear()
        self.connected = connected
        self._changed()

    def failed(self) -> None:
        """A call there died: nothing new until the next load report."""
        self._set_connected(False)

    def fault(self, reason: str, *, died: bool) -> None:
        """A request failed there, by the worker's fault. `died`: the connection, with all that was aboard."""
        if died and not self.connected:
            return  # one loss, however many requests it cost
        self.failures += 1
        if self.breaker.failed() and self._may_eject(self):
            seconds = self.breaker.open()
            _log.warning(
                "worker ejected: request after request failed there",
                worker_role=self.role,
                address=self.address,
                seconds=round(seconds, 1),
                reason=reason,
            )
            self._wake_after(seconds)
            self._changed()

    def _wake_after(self, seconds: float) -> None:
        """Requests that wait are told when it may be tried again; timers may be a bit early."""
        if self._wake is not None:
            self._wake.cancel()
        self._wake = asyncio.get_running_loop().call_later(seconds + 0.01, self._changed)

    def served(self) -> None:
        """A request went well there."""
        if self.breaker.succeeded():
            _log.info("worker is back: a request went well", worker_role=self.role, address=self.address)
            self._changed()

    def settled(self) -> None:
        """A request there is on its way: the next may follow."""
        if not self.breaker.closed:
            self.breaker.given()
            self._changed()

    def refused(self, until: float) -> None:
        """It is full: nothing new until `until` (the loop's clock)."""
        self.paused_until = until

    def take(self, sequences: int, tokens: int, prefix: Prefix) -> None:
        """Counts work that is about to be sent. `give` takes the sequences back."""
        self.outstanding += sequences
        self.breaker.taken()
        self.idle.clear()
        self.pending_tokens += tokens
        if self.info.layout.block_size:
            self.pending_blocks += -(-tokens // self.info.layout.block_size) + sequences
        self.memory.remember(prefix)

    def give(self, sequences: int) -> None:
        """The work is over, however it ended."""
        self.outstanding -= sequences
        self.breaker.given()
        if self.outstanding == 0:
            self.idle.set()
        self._changed()

    async def close(self) -> None:
        """Ends the channel and every call on it."""
        if self._wake is not None:
            self._wake.cancel()
        tasks = [*self._feed_tasks, *self._closing]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(Exception):
            await self.channel.close()


async def _close_after_calls(channel: grpc.aio.Channel) -> None:
    try:
        await channel.close(OLD_CHANNEL_SECONDS)
    except asyncio.CancelledError:
        await channel.close()
        raise


def _reason(exc: Exception) -> str:
    if isinstance(exc, TimeoutError):
        return "no load report in time"
    return (exc.details() if isinstance(exc, grpc.aio.AioRpcError) else None) or repr(exc)
