"""A prefill worker on a real server with a fake engine, and the decode side of its transfers, over loopback."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from prefill_scheduling import EOS, VOCAB, make_record

from engine.batch import Batch, SampleSpec, Slice, StepOutput
from engine.fake import SLOT_BYTES, FakeRunner
from kv_transfer.leases import Lease, LeaseTable
from kv_transfer.messages import Commit, Offer, Open
from kv_transfer.pool import LocalPool, SharedPool
from kv_transfer.registry import target_transport
from kv_transfer.session import Receiver, ReceiveSession
from prefill_service.assembly import Assembly, Parts, assemble
from prefill_service.config import SchedulerConfig
from tandem.errors import TandemError
from tandem.kv_layout import KvLayout
from tandem.record import Record
from tandem.service import wire
from tandem.service.channel import open_channel
from tandem.service.metrics import Metrics
from tandem.service.server import ServerShell
from tandem.service.status import from_rpc_error
from tandem.service.wire import layout_to_pb
from tandem.v1 import kv_transfer_pb2 as kv_pb
from tandem.v1 import kv_transfer_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from worker.identity import WorkerIdentity
from worker.transfer_messages import answer_to_pb, commit_from_pb, heartbeat_to_pb, offer_from_pb, open_from_pb

BLOCK_SIZE = 4
MODEL = "model-1"
NUMERICS = "numerics-1"
WAIT = 20.0


def layout(block_size: int = BLOCK_SIZE) -> KvLayout:
    """The fake engine's."""
    return KvLayout(block_size, "float32", num_layers=1, num_kv_heads=1, head_dim=2)


class GatedRunner(FakeRunner):
    """A fake engine whose steps a test can hold up, or make fail."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.permits = threading.Semaphore(0)
        self.gated = False
        self.fail_steps = 0
        self.waiting = threading.Event()

    def hold(self) -> None:
        """From now on each step needs a `permit`."""
        self.gated = True

    def permit(self, steps: int = 1) -> None:
        self.permits.release(steps)

    def free(self) -> None:
        """No more permits needed."""
        self.gated = False
        self.permits.release(1000)

    def run(self, batch: Batch) -> StepOutput:
        if self.gated:
            self.waiting.set()
            self.permits.acquire()
            self.waiting.clear()
        if self.fail_steps:
            self.fail_steps -= 1
            raise RuntimeError("the device is on fire")
        return super().run(batch)


class OneWriter:
    """A context whose writes wait for each other, as gRPC wants it."""

    def __init__(self, context: Any) -> None:
        self._context, self._lock = context, asyncio.Lock()

    async def write(self, message: Any) -> None:
        async with self._lock:
            await self._context.write(message)


@dataclass
class FakeDecode(kv_transfer_pb2_grpc.KvTransferServiceServicer):
    """The receiving side: leases into a pool of its own, by `ReceiveSession`. Faults are set by the test."""

    num_blocks: int = 256
    numerics_id: str = NUMERICS
    incarnation: str = "decode-1"
    on_offer: Callable[[Offer], Awaitable[None]] | None = None
    on_commit: Callable[[Commit], Awaitable[None]] | None = None
    answer_open: Callable[[], Awaitable[list[kv_pb.TransferResponse]]] | None = None
    opens: list[Open] = field(default_factory=list)
    offers: list[Offer] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    streams: int = 0
    silent: bool = False
    address: str = ""

    def __post_init__(self) -> None:
        self.pool = LocalPool(self.num_blocks, BLOCK_SIZE * SLOT_BYTES)
        self.leases = LeaseTable(self.incarnation, BLOCK_SIZE)
        transports = {name: target_transport(name) for name in ("shm", "grpc")}
        self.receiver = Receiver(self.leases, self.pool, layout(), MODEL, self.numerics_id, transports)
        self.shell = ServerShell("decode", "127.0.0.1:0")
        kv_transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(self, self.shell.server)
        self._free = list(range(self.num_blocks - 64))  # the last ones are `check_kv`'s

    async def start(self) -> None:
        self.address = await self.shell.start()

    async def stop(self) -> None:
        await self.shell.server.stop(0)
        for transport in self.receiver.transports.values():
            await asyncio.to_thread(transport.close)

    def grant(self, record: Record, needed_start: int = 0, needed_end: int | None = None) -> Lease:
        tokens = len(record.prompt) + (len(record.outputs[0].token_ids) if len(record.outputs) == 1 else 0)
        end = tokens if needed_end is None else needed_end
        count = -(-end // BLOCK_SIZE) - needed_start // BLOCK_SIZE
        blocks = [self._free.pop() for _ in range(count)]
        return self.leases.grant(record.request_id, needed_start, end, blocks, lambda: self._free.extend(blocks))

    async def Transfer(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        session = ReceiveSession(self.receiver)
        self.streams += 1
        context = OneWriter(context)
        beats = asyncio.create_task(self._beat(context))
        try:
            async for request in request_iterator:
                if await self._handle(session, request, context):
                    return
        finally:
            self.streams -= 1
            beats.cancel()
            await asyncio.gather(beats, return_exceptions=True)
            session.close()

    async def _beat(self, context: Any) -> None:
        while True:
            await asyncio.sleep(0.2)
            if not self.silent:
                await context.write(heartbeat_to_pb())

    async def _handle(self, session: ReceiveSession, request: kv_pb.TransferRequest, context: Any) -> bool:
        kind = request.WhichOneof("event")
        if kind == "open":
            self.opens.append(open_from_pb(request.open))
            if self.answer_open is not None:
                for answer in await self.answer_open():
                    await context.write(answer)
                return True
            opened = await asyncio.to_thread(session.on_open, self.opens[-1])
            await context.write(answer_to_pb(opened))
        elif kind == "offer":
            offer = offer_from_pb(request.offer)
            self.offers.append(offer)
            if self.on_offer is not None:
                await self.on_offer(offer)
            ack = await asyncio.to_thread(session.copy, session.on_offer(offer))
            await context.write(answer_to_pb(ack))
        else:
            commit = commit_from_pb(request.commit)
            self.commits.append(commit)
            if self.on_commit is not None:
                await self.on_commit(commit)
            await context.write(answer_to_pb(await asyncio.to_thread(session.on_commit, commit)))
            return True
        return False

    def check_kv(self, record: Record, lease: Lease, prefix_blocks: int = 0) -> None:
        """Goes on from the lease's blocks: the fake engine finds out whether they hold the sequence's KV."""
        runner = FakeRunner(self.num_blocks, BLOCK_SIZE, vocab_size=VOCAB, buffer=self.pool.buffer)
        tokens = [*record.prompt, *(record.outputs[0].token_ids if len(record.outputs) == 1 else [])]
        assert prefix_blocks * BLOCK_SIZE == lease.needed_start
        free = list(range(self.num_blocks - prefix_blocks - 1, self.num_blocks))
        if prefix_blocks:
            head = Slice("head", tokens[: lease.needed_start], 0, free[:prefix_blocks])
            runner.run(Batch([head]))
        table = [*free[:prefix_blocks], *lease.blocks, free[-1]]
        spec = SampleSpec(0, record.sampling, 1, [*tokens, 7], [8])
        runner.run(Batch([Slice("next", [7, 8], len(tokens), table, [spec])]))


@dataclass
class Rig:
    """A worker, its client and a decode worker."""

    assembly: Assembly
    runner: GatedRunner
    decode: FakeDecode
    stub: Any
    address: str
    metrics: Metrics

    @property
    def identity(self) -> WorkerIdentity:
        return self.assembly.worker.identity

    def request(
        self,
        record: Record,
        lease: Lease | None = None,
        *,
        transports: tuple[str, ...] = ("shm", "grpc"),
        **target: Any,
    ) -> prefill_pb2.PrefillRequest:
        lease = lease or self.decode.grant(record)
        values: dict[str, Any] = {
            "lease_id": lease.lease_id,
            "attempt": lease.attempt,
            "address": self.decode.address,
            "incarnation": self.decode.incarnation,
            "needed_start": lease.needed_start,
            "needed_end": lease.needed_end,
            "layout": layout_to_pb(layout()),
            "transports": transports,
        }
        return prefill_pb2.PrefillRequest(
            record=wire.record_to_pb(record),
            incarnation=self.identity.incarnation,
            target=prefill_pb2.TransferTarget(**{**values, **target}),
        )

    async def prefill(self, request: prefill_pb2.PrefillRequest, time_left: float | None = None) -> Prefilled:
        """The whole call. Raises TandemErrors."""
        return await collect(self.stub.Prefill(request, timeout=time_left))

    async def error_of(self, request: prefill_pb2.PrefillRequest) -> TandemError:
        try:
            await self.prefill(request)
        except TandemError as exc:
            return exc
        raise AssertionError("the call should have failed")

    async def settled(self) -> None:
        """Everything that a call held is free again."""
        await until(lambda: self.assembly.worker.open_calls == 0 and len(self.assembly.scheduler) == 0)
        assert self.assembly.scheduler.pool.num_free == self.assembly.scheduler.pool.num_blocks
        self.assembly.scheduler.check_integrity()
        await until(lambda: self.decode.streams == 0)


@dataclass
class Prefilled:
    """What a gateway saw."""

    events: list[str] = field(default_factory=list)
    cached_tokens: int = 0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    progress: list[prefill_pb2.PrefillProgress] = field(default_factory=list)
    done: prefill_pb2.PrefillDone | None = None

    def take(self, response: prefill_pb2.PrefillResponse) -> None:
        kind = response.WhichOneof("event")
        if kind == "progress":
            self.progress.append(response.progress)
            return
        self.events.append(kind)
        if kind == "accepted":
            self.cached_tokens = response.accepted.cached_tokens
        elif kind == "first_tokens":
            self.tokens = {delta.index: list(delta.token_ids) for delta in response.first_tokens.deltas}
        else:
            self.done = response.done


async def collect(call: Any) -> Prefilled:
    seen = Prefilled()
    try:
        while (response := await call.read()) is not grpc.aio.EOF:
            seen.take(response)
    except grpc.RpcError as exc:
        raise from_rpc_error(exc) from exc
    return seen


@asynccontextmanager
async def serving(
    *,
    num_blocks: int = 64,
    chunk: int = 16,
    transports: tuple[str, ...] = ("shm", "grpc"),
    decode_blocks: int = 256,
    **limits: Any,
) -> AsyncIterator[Rig]:
    """A worker on loopback, with a decode worker beside it."""
    block_bytes = BLOCK_SIZE * SLOT_BYTES
    memory = SharedPool(num_blocks, block_bytes) if "shm" in transports else LocalPool(num_blocks, block_bytes)
    runner = GatedRunner(num_blocks, BLOCK_SIZE, vocab_size=VOCAB, buffer=memory.buffer)
    identity = WorkerIdentity(
        incarnation="prefill-1",
        model_id=MODEL,
        model_name="fake",
        layout=layout(),
        numerics_id=NUMERICS,
        max_context=512,
        vocab_size=VOCAB,
        eos_token_ids=(EOS,),
        transports=transports,
        total_blocks=num_blocks,
        max_sequences=8,
        host_id="here",
    )
    values = {"max_step_tokens": chunk, "max_sequences": 8, "max_context": 512, "vocab_size": VOCAB, **limits}
    config = SchedulerConfig(eos_token_ids=(EOS,), model_id=MODEL, layout_id="l", numerics_id=NUMERICS, **values)
    metrics = Metrics("prefill")
    assembly = assemble(Parts(identity, config, runner, memory), "127.0.0.1:0", metrics)
    decode = FakeDecode(decode_blocks)
    await decode.start()
    address = await assembly.start()
    async with open_channel(address) as channel:
        try:
            yield Rig(assembly, runner, decode, prefill_pb2_grpc.PrefillServiceStub(channel), address, metrics)
        finally:
            runner.free()
            await assembly.shell.server.stop(0)
            await assembly.close()
            await decode.stop()


async def until(condition: Callable[[], bool], seconds: float = WAIT) -> None:
    """Waits for a condition that other threads or processes bring about."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "the condition never came"
        await asyncio.sleep(0.002)


def record_of(prompt: list[int] | int, **options: Any) -> Record:
    """A record for the fake model."""
    return make_record(prompt, model_id=MODEL, **options)


def metric(metrics: Metrics, name: str) -> float:
    """Sum of a metric's samples."""
    families = metrics.registry.collect()
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)
