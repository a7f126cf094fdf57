"""A decode worker on a real loopback server with the fake engine, a fake gateway and a fake prefill worker."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from decode_scheduling import VOCAB

from decode_service.assembly import Assembly, Parts, assemble
from decode_service.config import SchedulerConfig
from decode_service.speculation.config import SpeculationConfig
from engine.batch import Batch, SampleSpec, Slice, StepOutput, StepRunner
from engine.fake import SLOT_BYTES, FakeRunner
from kv_transfer.messages import Ack, Committed, Opened
from kv_transfer.pool import LocalPool, SharedPool
from kv_transfer.registry import source_transport
from kv_transfer.session import Sender, SendSession
from tandem.kv_layout import KvLayout
from tandem.record import OutputState, Record, SamplingParams, StopRules, TokenDelta
from tandem.service import wire
from tandem.service.channel import open_channel
from tandem.service.metrics import Metrics
from tandem.service.tls import ChannelTls, Tls
from tandem.v1 import decode_pb2, decode_pb2_grpc, kv_transfer_pb2_grpc
from worker.identity import WorkerIdentity
from worker.transfer_messages import commit_to_pb, offer_to_pb, open_to_pb

BLOCK = 4
LAYOUT = KvLayout(BLOCK, "float32", 1, 1, 2)
INCARNATION = "decode-1"
MODEL, NUMERICS = "model-1", "numerics-1"
assert LAYOUT.block_bytes == BLOCK * SLOT_BYTES


class PacedRunner(FakeRunner):
    """The fake engine at a pace, with a gate to stick in and a failure to order."""

    def __init__(self, num_blocks: int, pace: float = 0.0) -> None:
        super().__init__(num_blocks, BLOCK, vocab_size=VOCAB)
        self.pace = pace
        self.gate = threading.Event()
        self.gate.set()
        self.stuck = threading.Event()
        self.fail_next = False

    def run(self, batch: Batch) -> StepOutput:
        if not self.gate.is_set():
            self.stuck.set()
            self.gate.wait()
        if self.pace:
            time.sleep(self.pace)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the device is on fire")
        return super().run(batch)


class FarRunner:
    """A fake engine whose cache transfers can't reach, as a GPU's: what has arrived is brought there by its steps."""

    def __init__(self, num_blocks: int) -> None:
        self._near = PacedRunner(num_blocks)
        self.buffer = memoryview(bytearray(num_blocks * LAYOUT.block_bytes))

    def warm_up(self) -> None:
        """Nothing to do."""

    def run(self, batch: Batch) -> StepOutput:
        size = LAYOUT.block_bytes
        for block in batch.arrived:
            at = slice(block * size, (block + 1) * size)
            self._near.buffer[at] = self.buffer[at]
        return self._near.run(batch)


def record_of(
    prompt: int | list[int], *, max_tokens: int = 8, n: int = 1, seed: int = 1, outputs: Any = None, **fields: Any
) -> Record:
    tokens = [(seed * 13 + i * 5 + 1) % VOCAB for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Record(
        request_id=f"request-{seed}",
        model_id=fields.pop("model_id", MODEL),
        prompt=tokens,
        sampling=SamplingParams(seed=seed, n=n),
        stopping=StopRules(max_tokens=max_tokens, ignore_eos=True),
        outputs=[OutputState(list(out)) for out in (outputs or [[]] * n)],
        **fields,
    )


def expected_tokens(record: Record, index: int = 0) -> list[int]:
    """What the fake engine says after the prompt, alone."""
    runner, tokens = FakeRunner(1, 1, vocab_size=VOCAB), list(record.prompt)
    for position in range(record.stopping.max_tokens):
        tokens.append(runner.expected(tokens, record.sampling.seed, index, position))
    return tokens[len(record.prompt) :]


@dataclass
class Output:
    """What a fake gateway has seen of a request."""

    tokens: dict[int, dict[int, int]] = field(default_factory=dict)
    finished: dict[int, int] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    heartbeats: list[int] = field(default_factory=list)
    retargeted: list[Any] = field(default_factory=list)
    end: Any = None

    def take(self, response: Any) -> None:
        kind = response.WhichOneof("event")
        if kind == "tokens":
            for delta in response.tokens.deltas:
                self.drafted += delta.drafted
                self.accepted += delta.accepted
                for offset, token in enumerate(delta.token_ids):
                    known = self.tokens.setdefault(delta.index, {}).setdefault(delta.position + offset, token)
                    assert known == token
        elif kind == "finished":
            self.finished[response.finished.index] = response.finished.finish_reason
            self.counts[response.finished.index] = response.finished.num_tokens
        elif kind == "heartbeat":
            self.heartbeats.append(response.heartbeat.steps)
        elif kind == "retargeted":
            self.retargeted.append(response.retargeted)
        elif kind == "end":
            self.end = response.end

    def ids(self, index: int = 0) -> list[int]:
        got = self.tokens.get(index, {})
        return [got[position] for position in sorted(got)]


async def read_raw(call: Any) -> Any:
    """The next message, or EOF however the stream ended."""
    try:
        return await call.read()
    except grpc.aio.AioRpcError:
        return grpc.aio.EOF


class Call:
    """One Decode stream of the fake gateway."""

    def __init__(
        self, rig: Rig, record: Record, *, local: bool, attempt: int = 0, incarnation: str = INCARNATION
    ) -> None:
        self.rig, self.record, self.output = rig, record, Output()
        self.call = rig.decode.Decode()
        source = decode_pb2.PREFILL_SOURCE_LOCAL if local else decode_pb2.PREFILL_SOURCE_REMOTE
        self.start = decode_pb2.DecodeStart(
            record=wire.record_to_pb(record), attempt=attempt, source=source, incarnation=incarnation
        )
        self.admitted: Any = None

    async def open(self) -> Call:
        await self.call.write(decode_pb2.DecodeRequest(start=self.start))
        self.admitted = (await self._next()).admitted
        return self

    async def _next(self) -> Any:
        response = await read_raw(self.call)
        if response is grpc.aio.EOF:
            code = await self.call.code()
            raise AssertionError(f"the stream ended with {code}: {await self.call.details()}")
        return response

    async def read_until(self, condition: Callable[[Output], Any]) -> Output:
        while not condition(self.output):
            self.output.take(await self._next())
        return self.output

    async def read_to_end(self) -> Output:
        await self.read_until(lambda output: output.end)
        assert await self.call.read() is grpc.aio.EOF
        assert await self.call.code() is grpc.StatusCode.OK
        return self.output

    async def read_error(self) -> tuple[grpc.StatusCode, str]:
        while (response := await read_raw(self.call)) is not grpc.aio.EOF:
            self.output.take(response)
        return await self.call.code(), reason_of(await self.call.trailing_metadata())

    async def retarget(self, attempt: int, *, local: bool, emitted: list[int] | None = None) -> Any:
        source = decode_pb2.PREFILL_SOURCE_LOCAL if local else decode_pb2.PREFILL_SOURCE_REMOTE
        deltas = [wire.delta_to_pb(TokenDelta(0, 0, emitted))] if emitted else []
        message = decode_pb2.DecodeRetarget(attempt=attempt, source=source, emitted=deltas)
        before = len(self.output.retargeted)
        await self.call.write(decode_pb2.DecodeRequest(retarget=message))
        await self.read_until(lambda output: len(output.retargeted) > before)
        return self.output.retargeted[-1]

    async def finish(self, index: int) -> None:
        await self.call.write(decode_pb2.DecodeRequest(finish=decode_pb2.DecodeFinish(index=index)))


def reason_of(metadata: Any) -> str:
    """The reason of the ErrorInfo in a status."""
    from google.rpc import error_details_pb2, status_pb2

    for key, value in metadata or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return info.reason
    return ""


class FakePrefill:
    """A prefill worker: computes prompts with a fake engine of its own and sends them."""

    def __init__(self, rig: Rig, transport: str, num_blocks: int = 64) -> None:
        self.pool = (SharedPool if transport == "shm" else LocalPool)(num_blocks, LAYOUT.block_bytes)
        self.runner = FakeRunner(num_blocks, BLOCK, vocab_size=VOCAB, buffer=self.pool.buffer)
        self.sender = Sender("prefill-1", MODEL, NUMERICS, LAYOUT)
        self.transport = source_transport(transport, self.pool, "prefill-1")
        self.rig = rig
        self._next = 0

    def close(self) -> None:
        self.transport.close()
        self.runner.buffer.release()
        if isinstance(self.pool, SharedPool):
            self.pool.close()

    def compute(self, record: Record) -> tuple[list[int], Record]:
        """Runs the prompt (and what outputs are known) in chunks of two blocks; the table and the record to commit."""
        known = record.outputs[0].token_ids if record.sampling.n == 1 else []
        tokens = [*record.prompt, *known]
        table = list(range(self._next, self._next + -(-len(tokens) // BLOCK)))
        self._next += len(table)
        for block in table:
            self.pool.generations[block] += 1
        specs = [
            SampleSpec(i, record.sampling, len(out.token_ids), record.prompt, out.token_ids)
            for i, out in enumerate(record.outputs)
        ]
        for start in range(0, len(tokens), 2 * BLOCK):
            part = tokens[start : start + 2 * BLOCK]
            last = start + len(part) == len(tokens)
            drawn = self.runner.run(Batch([Slice("p", part, start, table, specs if last else [])]))
        outputs = [
            OutputState([*out.token_ids, token.token_id])
            for out, token in zip(record.outputs, drawn.samples[0], strict=True)
        ]
        fields = {name: getattr(record, name) for name in Record.__slots__}
        return table, Record(**{**fields, "outputs": outputs})

    def session(self, admitted: Any) -> SendSession:
        return SendSession(
            self.sender,
            self.transport,
            lease_id=admitted.lease_id,
            attempt=admitted.attempt,
            target_incarnation=INCARNATION,
        )

    async def send(self, admitted: Any, record: Record) -> bool:
        """The whole transfer; True when this attempt committed."""
        table, done = self.compute(record)
        session, call = self.session(admitted), self.rig.transfers.Transfer()
        await call.write(open_to_pb(session.open()))
        session.on_opened(Opened(*(await read(call)).opened_range))
        session.ready(len(record.prompt) + (len(done.outputs[0].token_ids) - 1 if len(done.outputs) == 1 else 0), table)
        while (offer := session.next_offer()) is not None:
            await call.write(offer_to_pb(offer))
            session.on_ack(Ack((await read(call)).ack.sequence))
        await call.write(commit_to_pb(session.commit(done)))
        answer = (await read(call)).committed
        assert await call.read() is grpc.aio.EOF
        return session.on_committed(Committed(answer.already_committed))


class Answer:
    """A TransferResponse with its Opened as a pair."""

    def __init__(self, response: Any) -> None:
        self.ack, self.committed = response.ack, response.committed
        opened = response.opened
        self.opened_range = opened.needed_start, opened.needed_end, opened.block_size


async def read(call: Any) -> Answer:
    response = await read_raw(call)
    if response is grpc.aio.EOF:
        raise TransferEnded(await call.code(), reason_of(await call.trailing_metadata()))
    return Answer(response)


class TransferEnded(Exception):  # noqa: N818
    """The decode worker ended a transfer; args: code, reason."""


async def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Polls: what is waited for has no event of its own."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@dataclass
class Rig:
    """The worker under test and stubs to it."""

    assembly: Assembly
    runner: Any
    channel: grpc.aio.Channel
    metrics: Metrics
    address: str
    transfer_channel: grpc.aio.Channel | None = None
    """Where prefill workers come from, if not from the gateway's channel."""

    @property
    def decode(self) -> Any:
        return decode_pb2_grpc.DecodeServiceStub(self.channel)

    @property
    def transfers(self) -> Any:
        return kv_transfer_pb2_grpc.KvTransferServiceStub(self.transfer_channel or self.channel)

    async def call(self, record: Record, *, local: bool = True, **fields: Any) -> Call:
        return await Call(self, record, local=local, **fields).open()

    async def all_free(self) -> None:
        """Waits until the worker holds nothing, then checks the books."""
        worker = self.assembly.worker
        await eventually(lambda: not worker.open_calls and not len(worker.leases))
        # The last release was posted before; commands run in order.
        assert await worker.engine.call(len) == 0
        await worker.engine.call(lambda scheduler: scheduler.check_integrity())
        assert self.assembly.pool.num_free == self.assembly.pool.num_blocks

    def value(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"role": "decode"}) or 0.0


@asynccontextmanager
async def running_rig(
    *,
    num_blocks: int = 64,
    pace: float = 0.0,
    stream_limit: int = 4096,
    runner: StepRunner | None = None,
    tls: Tls | None = None,
    gateway: ChannelTls | None = None,
    speculation: SpeculationConfig | None = None,
) -> AsyncIterator[Rig]:
    engine: Any = runner or PacedRunner(num_blocks, pace)
    blocks = getattr(engine, "buffer", None) or memoryview(bytearray(num_blocks * LAYOUT.block_bytes))
    transports = ("memory", "shm", "grpc")
    identity = WorkerIdentity(
        INCARNATION,
        MODEL,
        "tiny",
        LAYOUT,
        NUMERICS,
        4096,
        VOCAB,
        (0,),
        transports,
        num_blocks,
        16,
        "fake",
        "none",
        "m:1",
    )
    config = SchedulerConfig(
        max_step_tokens=16, max_sequences=16, max_context=4096, vocab_size=VOCAB, eos_token_ids=(0,), model_id=MODEL
    )
    metrics = Metrics("decode")
    parts = Parts(identity, config, engine, blocks, stream_limit=stream_limit)
    if speculation is not None:
        parts = replace(parts, speculation=speculation)
    assembly = assemble(parts, "127.0.0.1:0", metrics, tls)
    address = await assembly.start()
    channel = open_channel(address, tls=gateway)
    try:
        yield Rig(assembly, engine, channel, metrics, address)
    finally:
        if hasattr(engine, "gate"):
            engine.gate.set()
        await channel.close()
        await assembly.shell.server.stop(0)
        await assembly.close()
