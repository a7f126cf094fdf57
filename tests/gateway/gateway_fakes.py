"""Fake prefill and decode workers that hold the wire contract and fail on command."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from gateway.discovery.source import Addresses
from gateway.wiring import Gateway
from tandem.errors import DrainingError, OverloadedError, StaleError
from tandem.kv_layout import KvLayout
from tandem.service import wire
from tandem.service.channel import open_channel
from tandem.service.peers import callers, peer_of
from tandem.service.server import ServerShell
from tandem.service.tls import ChannelTls, Tls
from tandem.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    types_pb2,
)

BEAT = 0.1
LAYOUT = KvLayout(block_size=16, dtype="float32", num_layers=2, num_kv_heads=2, head_dim=8)
SERVICES = ("tandem.v1.DecodeService", "tandem.v1.PrefillService")
_numbers = itertools.count(1)


def script_token(index: int, position: int) -> int:
    """What every fake worker "samples" unless it has a script."""
    return 300 + (index * 1000 + position * 7) % 40_000


@dataclass
class Granted:
    """One lease on a fake decode worker."""

    record: types_pb2.Record
    attempt: int
    committed: asyncio.Event = field(default_factory=asyncio.Event)


class FakeWorker:
    """What both roles share: info, load, a server."""

    role = types_pb2.WORKER_ROLE_UNSPECIFIED

    def __init__(self, *, listen: str = "127.0.0.1:0", tls: Tls | None = None, **info: Any) -> None:
        number = next(_numbers)
        layout = wire.layout_to_pb(LAYOUT)
        values = {
            "role": self.role,
            "incarnation": f"life-{number}",
            "model_id": "m" * 64,
            "model_name": "tiny",
            "layout": layout,
            "numerics_id": "exact",
            "max_context": 8192,
            "vocab_size": 49152,
            "eos_token_ids": [2],
            "transports": ["shm", "grpc"],
            "total_blocks": 1000,
            "max_sequences": 64,
            "architecture": "llama",
            **info,
        }
        self.info = types_pb2.WorkerInfo(**values)
        self.load = types_pb2.WorkerLoad(incarnation=self.info.incarnation, free_blocks=1000, total_blocks=1000)
        self.callers: list[str] = []
        """Fingerprints of the certificates that asked what this worker is."""
        admit = callers(dict.fromkeys(SERVICES, "tandem-gateway"))
        self.shell = ServerShell("fake", listen, tls=tls, admit=admit if tls else None)
        self.address = ""
        self.script: list[list[int]] | None = None
        self.records: list[types_pb2.Record] = []
        self.open = 0
        self.cancelled = 0
        self.refuse = 0
        self.die_after: int | None = None
        self.hang_after: int | None = None
        self.drain_after: int | None = None
        self.silent = False
        self.load_silent = False
        """No load reports; streams go on."""
        self.dies_for_good = False
        """`die_after` ends the load reports too: unlike a link that broke."""
        # Shared by several workers: one of them fails per entry. None: every time.
        self.faults: list[str] | None = None

    async def start(self) -> None:
        self.address = await self.shell.start()

    async def stop(self) -> None:
        await self.shell.server.stop(0)

    def token(self, index: int, position: int) -> int:
        return self.script[index][position] if self.script else script_token(index, position)

    async def loads(self, kind: Any) -> AsyncIterator[Any]:
        while True:
            if not self.silent and not self.load_silent:
                yield kind(load=self.load)
            await asyncio.sleep(BEAT)

    def admit(self, record: types_pb2.Record, incarnation: str) -> None:
        """Notes the request or refuses it."""
        if incarnation != self.info.incarnation:
            raise StaleError(f"I am {self.info.incarnation}")
        if self.load.draining:
            raise DrainingError("draining")
        if self.refuse:
            self.refuse -= 1
            raise OverloadedError("no blocks", retry_after=0.05)
        self.records.append(record)

    async def misbehave(self, done: int, context: Any) -> None:
        """Fails after `done` units of work if told so."""
        faults = [self.die_after, self.drain_after, self.hang_after]
        if not any(after is not None and done >= after for after in faults):
            return
        if self.faults is not None:
            if not self.faults:
                return
            self.faults.pop()
        if self.die_after is not None and done >= self.die_after:
            self.silent = self.dies_for_good
            # No details: as the transport says it when the process is gone.
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        if self.drain_after is not None and done >= self.drain_after:
            self.load.draining = True
            raise DrainingError("draining")
        if self.hang_after is not None and done >= self.hang_after:
            self.silent = True
            await asyncio.Event().wait()


class FakeDecode(FakeWorker, decode_pb2_grpc.DecodeServiceServicer):
    """Streams scripted tokens, on feeds where they are opened; `pause` seconds between them."""

    role = types_pb2.WORKER_ROLE_DECODE

    def __init__(self, **info: Any) -> None:
        super().__init__(**info)
        self.leases: dict[str, Granted] = {}
        self.pause = 0.0
        self.stream_pause_after: int | None = None
        self.resume = asyncio.Event()
        self.sources: list[int] = []
        self.retargets: list[decode_pb2.DecodeRetarget] = []
        self.finishes: list[int] = []
        self.tokens_sent = 0
        self.has_feeds = True
        self.feeds: dict[str, asyncio.Queue[decode_pb2.FeedTokens]] = {}
        self.fed = 0
        self.feed_open = asyncio.Event()
        self.feed_open.set()
        self.feed_dies_after: int | None = None
        """Messages; the feed alone ends then."""
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, self.shell.server)

    async def GetDecodeInfo(self, request: Any, context: Any) -> Any:
        self.callers.append(peer_of(context).fingerprint)
        return decode_pb2.GetDecodeInfoResponse(info=self.info)

    async def WatchDecodeLoad(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for response in self.loads(decode_pb2.WatchDecodeLoadResponse):
            yield response

    async def WatchTokens(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if not self.has_feeds:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        assert request.incarnation == self.info.incarnation
        queue = self.feeds[request.feed_id] = asyncio.Queue()
        try:
            yield decode_pb2.WatchTokensResponse()
            while True:
                tokens = await queue.get()
                await self.feed_open.wait()
                if self.feed_dies_after is not None and self.fed >= self.feed_dies_after:
                    self.feed_dies_after = None
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                self.fed += 1
                yield decode_pb2.WatchTokensResponse(requests=[tokens])
        finally:
            del self.feeds[request.feed_id]

    async def Decode(self, requests: Any, context: Any) -> None:
        context = _OneWriter(context)
        self.open += 1
        tasks: list[asyncio.Task[Any]] = []
        try:
            start = (await anext(aiter(requests))).start
            self.admit(start.record, start.incarnation)
            self.sources.append(start.source)
            await self._run(start, requests, context, tasks)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.open -= 1
            for task in tasks:
                task.cancel()

    async def _run(self, start: Any, requests: Any, context: Any, tasks: list[asyncio.Task[Any]]) -> None:
        record = start.record
        lease_id, granted = f"lease-{next(_numbers)}", Granted(start.record, start.attempt)
        self.leases[lease_id] = granted
        if start.source == decode_pb2.PREFILL_SOURCE_LOCAL:
            granted.committed.set()
        needed = len(record.prompt_token_ids) + len(record.outputs[0].token_ids)
        admitted = decode_pb2.DecodeAdmitted(
            lease_id="" if granted.committed.is_set() else lease_id,
            attempt=start.attempt,
            needed_start=0,
            needed_end=needed,
        )
        await context.write(decode_pb2.DecodeResponse(admitted=admitted))
        finished: set[int] = set()
        tasks.append(asyncio.create_task(self._listen(requests, context, granted, finished)))
        tasks.append(asyncio.create_task(self._beat(context)))
        await granted.committed.wait()
        await self._stream(start, context, finished)
        await context.write(decode_pb2.DecodeResponse(end=decode_pb2.DecodeEnd(preemptions=1)))

    async def _beat(self, context: Any) -> None:
        while True:
            if not self.silent:
                await context.write(decode_pb2.DecodeResponse(heartbeat=decode_pb2.DecodeHeartbeat(steps=1)))
            await asyncio.sleep(BEAT)

    async def _listen(self, requests: Any, context: Any, granted: Granted, finished: set[int]) -> None:
        async for request in requests:
            if request.WhichOneof("event") == "finish":
                self.finishes.append(request.finish.index)
                finished.add(request.finish.index)
                continue
            retarget = request.retarget
            self.retargets.append(retarget)
            done = granted.committed.is_set()
            status = decode_pb2.RETARGET_STATUS_COMMITTED if done else decode_pb2.RETARGET_STATUS_ACCEPTED
            granted.attempt = retarget.attempt
            answer = decode_pb2.DecodeRetargeted(
                attempt=retarget.attempt, status=status, needed_end=len(granted.record.prompt_token_ids)
            )
            await context.write(decode_pb2.DecodeResponse(retargeted=answer))
            if retarget.source == decode_pb2.PREFILL_SOURCE_LOCAL:
                granted.committed.set()

    async def _send(self, start: Any, context: Any, delta: types_pb2.TokenDelta) -> None:
        if (queue := self.feeds.get(start.feed_id)) is not None:
            queue.put_nowait(decode_pb2.FeedTokens(number=start.feed_number, deltas=[delta]))
        else:
            await context.write(decode_pb2.DecodeResponse(tokens=decode_pb2.DecodeTokens(deltas=[delta])))

    async def _stream(self, start: Any, context: Any, finished: set[int]) -> None:
        record = start.record
        starts = [len(output.token_ids) for output in record.outputs]
        for i, output in enumerate(record.outputs):
            # The record must hold exactly what was given out.
            assert list(output.token_ids) == [self.token(i, p) for p in range(starts[i])]
            if output.finish_reason:
                finished.add(i)
        sent = 0
        for position in range(min(starts), record.stopping.max_tokens):
            if sent == self.stream_pause_after:
                await self.resume.wait()
            await self.misbehave(sent, context)
            for index in range(len(record.outputs)):
                if index in finished or position < starts[index]:
                    continue
                delta = types_pb2.TokenDelta(index=index, position=position, token_ids=[self.token(index, position)])
                if record.speculation.mode == "ngram":
                    delta.drafted, delta.accepted = 3, 1
                if record.HasField("logprobs"):
                    delta.logprobs.CopyFrom(_logprobs(delta.token_ids[0], record.logprobs))
                await self._send(start, context, delta)
                self.tokens_sent += 1
            sent += 1
            await asyncio.sleep(self.pause)
            if len(finished) == len(record.outputs):
                break
        for index in range(len(record.outputs)):
            if index not in finished:
                done = decode_pb2.DecodeFinished(
                    index=index, finish_reason=types_pb2.FINISH_REASON_LENGTH, num_tokens=record.stopping.max_tokens
                )
                await context.write(decode_pb2.DecodeResponse(finished=done))


class _OneWriter:
    """A context whose writes queue up: gRPC takes one at a time, and no status beside one."""

    def __init__(self, context: Any) -> None:
        self._context, self._lock = context, asyncio.Lock()

    async def write(self, message: Any) -> None:
        async with self._lock:
            await asyncio.shield(self._context.write(message))

    async def abort(self, *status: Any) -> None:
        async with self._lock:
            await self._context.abort(*status)


def _logprobs(token: int, count: int) -> types_pb2.TokenLogprobs:
    return types_pb2.TokenLogprobs(
        token_logprobs=[-0.5],
        top_count=count,
        top_token_ids=[token + i for i in range(count)],
        top_logprobs=[-0.5 - i for i in range(count)],
    )


class FakePrefill(FakeWorker, prefill_pb2_grpc.PrefillServiceServicer):
    """Phases that `die_after`, `hang_after`, `drain_after` count: 0 accepted, 1 first tokens, 2 committed."""

    role = types_pb2.WORKER_ROLE_PREFILL

    def __init__(self, cluster: Cluster, **info: Any) -> None:
        super().__init__(**info)
        self._cluster = cluster
        self.requests: list[prefill_pb2.PrefillRequest] = []
        self.hold = asyncio.Event()
        self.hold.set()
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, self.shell.server)

    async def GetPrefillInfo(self, request: Any, context: Any) -> Any:
        return prefill_pb2.GetPrefillInfoResponse(info=self.info)

    async def WatchPrefillLoad(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for response in self.loads(prefill_pb2.WatchPrefillLoadResponse):
            yield response

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: Any) -> AsyncIterator[Any]:
        self.open += 1
        try:
            self.admit(request.record, request.incarnation)
            self.requests.append(request)
            accepted = prefill_pb2.PrefillAccepted(cached_tokens=3)
            yield prefill_pb2.PrefillResponse(accepted=accepted)
            await self.misbehave(0, context)
            while not self.hold.is_set():
                yield prefill_pb2.PrefillResponse(progress=prefill_pb2.PrefillProgress(steps=1))
                await asyncio.sleep(BEAT)
            yield prefill_pb2.PrefillResponse(first_tokens=self._first(request.record))
            await self.misbehave(1, context)
            self._commit(request.target)
            await self.misbehave(2, context)
            done = prefill_pb2.PrefillDone(status=prefill_pb2.COMMIT_STATUS_COMMITTED)
            yield prefill_pb2.PrefillResponse(done=done)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.open -= 1

    def _first(self, record: types_pb2.Record) -> prefill_pb2.PrefillFirstTokens:
        deltas = []
        for index, output in enumerate(record.outputs):
            position = len(output.token_ids)
            delta = types_pb2.TokenDelta(index=index, position=position, token_ids=[self.token(index, position)])
            if record.HasField("logprobs"):
                delta.logprobs.CopyFrom(_logprobs(delta.token_ids[0], record.logprobs))
            deltas.append(delta)
        return prefill_pb2.PrefillFirstTokens(deltas=deltas)

    def _commit(self, target: prefill_pb2.TransferTarget) -> None:
        decode = next(worker for worker in self._cluster.decode if worker.address == target.address)
        granted = decode.leases[target.lease_id]
        assert granted.attempt == target.attempt
        assert target.incarnation == decode.info.incarnation
        granted.committed.set()


class Cluster:
    """All fake workers of a test."""

    def __init__(self) -> None:
        self.prefill: list[FakePrefill] = []
        self.decode: list[FakeDecode] = []

    async def start(self, prefill: int = 1, decode: int = 1, script: list[list[int]] | None = None) -> None:
        for _ in range(prefill):
            await self.add_prefill()
        for _ in range(decode):
            await self.add_decode()
        for worker in (*self.prefill, *self.decode):
            worker.script = script

    async def add_prefill(self, **info: Any) -> FakePrefill:
        worker = FakePrefill(self, **info)
        await worker.start()
        self.prefill.append(worker)
        return worker

    async def add_decode(self, **info: Any) -> FakeDecode:
        worker = FakeDecode(**info)
        await worker.start()
        self.decode.append(worker)
        return worker

    async def close(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in (*self.prefill, *self.decode)))


class Front:
    """A gateway and a client of it."""

    def __init__(self, gateway: Gateway, tls: ChannelTls | None = None) -> None:
        self.gateway = gateway
        self.channel = open_channel(gateway.address, tls=tls)
        self.stub: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)

    async def until_ready(self, prefill: int, decode: int) -> None:
        pool = self.gateway.pool
        await until(
            lambda: sum(w.ready for w in pool.prefill) >= prefill and sum(w.ready for w in pool.decode) >= decode
        )
        await until(lambda: all(w.feed and (w.feed.ready or w.feed.unknown) for w in pool.decode if w.ready))

    async def collect(self, call: Any) -> list[inference_pb2.GenerateStreamResponse]:
        responses = []
        while (response := await call.read()) is not grpc.aio.EOF:
            responses.append(response)
        return responses

    def stream(self, tokens: int = 8, prompt: Sequence[int] = tuple(range(100, 164)), **more: Any) -> Any:
        """A GenerateStream call on token ids."""
        timeout = more.pop("timeout", 15)
        return self.stub.GenerateStream(self.request(tokens, prompt, **more), timeout=timeout)

    def request(
        self, tokens: int = 8, prompt: Sequence[int] = tuple(range(100, 164)), **more: Any
    ) -> inference_pb2.GenerateStreamRequest:
        stopping = types_pb2.StoppingParams(max_tokens=tokens, **more.pop("stopping", {}))
        if "text" not in more and "messages" not in more:
            more["token_ids"] = inference_pb2.TokenIds(ids=prompt)
        return inference_pb2.GenerateStreamRequest(stopping=stopping, **more)


class Heard:
    """What a source of workers reported."""

    def __init__(self) -> None:
        self.last = Addresses()
        self.reports = 0
        self.troubles: list[str] = []

    def found(self, addresses: Addresses) -> None:
        self.last, self.reports = addresses, self.reports + 1

    def trouble(self, reason: str) -> None:
        self.troubles.append(reason)


def tokens_of(responses: Sequence[inference_pb2.GenerateStreamResponse], index: int = 0) -> list[int]:
    """Token ids of one choice."""
    deltas = [r.delta for r in responses if r.WhichOneof("event") == "delta" and r.delta.index == index]
    return [token for delta in deltas for token in delta.token_ids]


def text_of(responses: Sequence[inference_pb2.GenerateStreamResponse], index: int = 0) -> str:
    """Text of one choice."""
    deltas = [r.delta for r in responses if r.WhichOneof("event") == "delta" and r.delta.index == index]
    return "".join(delta.text for delta in deltas)


def expected(count: int, index: int = 0) -> list[int]:
    """What fake workers produce."""
    return [script_token(index, position) for position in range(count)]


async def until(condition: Any, timeout: float = 8.0) -> None:  # noqa: ASYNC109
    """Waits until `condition()` holds."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
