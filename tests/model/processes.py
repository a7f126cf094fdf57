"""One prefill and one decode worker as the explorer sees them: the real servicers, engine loops, schedulers, pools and
transfer sessions around the fake engine, each in a process that can be stepped, killed and started again.

A process has three kinds of events: a turn of its engine thread, a callback that another thread handed to its event
loop, and a step of one of its executor's threads. The engine's runner draws other tokens than any other process would,
so that a token drawn twice is seen.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextvars import copy_context
from typing import Any

from explorer import Source, Violation
from stepping import PART, Accesses, Recorder, SteppedLoop, pause
from wires import Wire, WireChannels

from decode_service.config import SchedulerConfig as DecodeConfig
from decode_service.scheduler import Scheduler as DecodeScheduler
from decode_service.servicer import DecodeServicer
from decode_service.transfer_servicer import TransferServicer
from decode_service.worker import DecodeWorker
from engine.batch import Batch, SampledToken, SampleSpec, Slice, StepOutput
from engine.block_pool import BlockPool, IntegrityError
from engine.fake import FakeRunner
from kv_transfer.leases import Lease
from kv_transfer.pool import PoolView
from kv_transfer.registry import source_transport, target_transport
from prefill_service.config import SchedulerConfig as PrefillConfig
from prefill_service.scheduler import Scheduler as PrefillScheduler
from prefill_service.servicer import PrefillServicer
from prefill_service.worker import PrefillWorker
from tandem.kv_layout import KvLayout
from worker.identity import WorkerIdentity

BLOCK = 2
LAYOUT = KvLayout(BLOCK, "float32", 1, 1, 2)
MODEL, NUMERICS, VOCAB = "m", "n", 97
LIMITS = {"max_step_tokens": BLOCK, "max_sequences": 4, "max_context": 64, "vocab_size": VOCAB, "model_id": MODEL}
Drawn = Callable[[str, SampleSpec], None]


class Generations:
    """A pool's generations: who reads and who bumps them is written down."""

    def __init__(self, name: str, count: int, recorder: Recorder) -> None:
        self._name, self._recorder = name, recorder
        self.values = memoryview(bytearray(8 * count)).cast("Q")

    def __getitem__(self, block: int) -> int:
        self._recorder.read(self._name, "generation", block)
        return self.values[block]

    def __setitem__(self, block: int, value: int) -> None:
        self._recorder.write(self._name, "generation", block)
        self.values[block] = value

    def __len__(self) -> int:
        return len(self.values)


class ReadPool:
    """A sender's pool as transports see it: whoever is about to read its bytes may be held up just before."""

    block_bytes = LAYOUT.block_bytes

    def __init__(self, name: str, buffer: memoryview, generations: Any, recorder: Recorder) -> None:
        self._name, self._buffer, self._recorder = name, buffer, recorder
        self.generations, self.num_blocks = generations, len(generations)

    @property
    def buffer(self) -> memoryview:
        pause()
        for block in range(self.num_blocks):
            self._recorder.read(self._name, "memory", block)
        return self._buffer


class Runner(FakeRunner):
    """The fake engine, which tells what it touches, and draws as no other process does."""

    def __init__(self, name: str, blocks: int, salt: int, recorder: Recorder, drawn: Drawn) -> None:
        super().__init__(blocks, BLOCK, vocab_size=VOCAB)
        self._name, self._salt, self._recorder, self._drawn = name, salt, recorder, drawn

    def run(self, batch: Batch) -> StepOutput:
        for part in batch.slices:
            for place, block in enumerate(part.block_table[: -(-part.end // BLOCK)]):
                touch = self._recorder.write if place >= part.start // BLOCK else self._recorder.read
                touch(self._name, "memory", block)
        for source, target in batch.copies:
            self._recorder.read(self._name, "memory", source)
            self._recorder.write(self._name, "memory", target)
        return super().run(batch)

    def _draw(self, chain: int, seed: int, index: int, position: int, suppress: tuple[int, ...]) -> int:
        return super()._draw(chain, seed + self._salt, index, position, suppress)

    def _sample(self, item: Slice, spec: SampleSpec, tokens: list[int], chain: int) -> SampledToken:
        self._drawn(self._name, spec)
        return super()._sample(item, spec, tokens, chain)


class Commands:
    """In place of the engine loop's queue."""

    def __init__(self, name: str, recorder: Recorder) -> None:
        self._name, self._recorder = name, recorder
        self.waiting: deque[Any] = deque()

    def put(self, command: Any) -> None:
        self._recorder.write(self._name, "commands")
        self.waiting.append(command)

    def get(self, block: bool, timeout: float) -> Any:
        if not self.waiting:
            raise queue.Empty
        return self.waiting.popleft()


class Process:
    """One life of a worker process. `name` is new for each life, `address` stays."""

    worker: Any
    runner: Runner
    memory: Any
    pool: BlockPool
    scheduler: Any
    transfers: TransferServicer
    main: str
    """The part of its event loop that serves the gateway; a decode worker's transfers are parts of their own."""

    def __init__(self, name: str, address: str, recorder: Recorder) -> None:
        self.name, self.address, self.recorder = name, address, recorder
        self.loop = SteppedLoop(name, recorder)
        self.alive = True
        self._idle = True
        self.parts: dict[Hashable, Hashable] = {}

    def _start(self) -> None:
        """After `worker` is made: its engine thread is this object's turns."""
        self.commands = Commands(self.name, self.recorder)
        self.engine = self.worker.engine
        self.engine._commands = self.commands
        self.engine._loop = self.loop

    def identity(self, blocks: int, transport: str) -> WorkerIdentity:
        """Of this life."""
        return WorkerIdentity(
            self.name, MODEL, MODEL, LAYOUT, NUMERICS, 64, VOCAB, (), (transport,), blocks, LIMITS["max_sequences"]
        )

    def react(self, part: Hashable, callback: Callable[..., Any], *args: Any) -> None:
        """An event of the event loop: `callback`, for one of its parts, and all that follows from it."""
        context = copy_context()
        context.run(PART.set, part)
        context.run(self.loop.settle, callback, *args)
        if self.loop.errors:
            raise Violation(f"{self.name}: {self.loop.errors[0]}")

    def enabled(self) -> Iterator[Source]:
        """Events that could come next."""
        if not self.alive:
            return
        for thread in self.loop.inbox:
            yield (self.name, "news", thread)
        if self.commands.waiting or not self._idle or self.engine._events or self.engine._answers:
            yield (self.name, "turn")
        for number, job in self.loop.jobs.items():
            if job.ready:
                yield (self.name, "job", number)

    def run(self, source: Source) -> None:
        """The next event of `source`."""
        if source[1] == "turn":
            self._turn()
        elif source[1] == "news":
            callback, args, origin = self.loop.take(source[2])
            self.recorder.accesses.origins.add(origin)
            self.react(self._part_of(source[2]), callback, *args)
        else:
            self._step_job(source[2])  # type: ignore[arg-type]

    def _part_of(self, thread: Hashable) -> Hashable:
        """Whom news of a thread concern at least: the engine's go to requests, a job's to who asked for it."""
        return self.parts.get(thread, self.main)

    def _step_job(self, number: int) -> None:
        job = self.loop.jobs[number]
        self.parts[number] = job.part
        self.recorder.accesses.origins.add(job.origin)
        # Jobs look at what the loop changes, the sessions' and the leases' state. What they change in it (counts of
        # copies, say) they change in any order with the same result; where not, `watch` says so.
        self.recorder.read(self.name, job.part)
        self.loop.step_job(number)

    def _turn(self) -> None:
        self.recorder.write(self.name, "commands")
        self.recorder.write(self.name, "engine")
        with self.loop.thread("engine"):
            commands, stopping = self.engine._receive(False)
            self._idle = self.engine._turn(commands, stopping, rested=False)
        try:
            self.scheduler.check_integrity()
        except (IntegrityError, AssertionError) as error:
            raise Violation(f"{self.name}: {error}") from error

    def kill(self) -> Accesses:
        """As by SIGKILL: what waits inside is gone, and nobody is told from here."""
        for part in ("engine", "commands", None, self.main, *self.parts.values()):
            self.recorder.write(self.name, part)
        self.alive = False
        return self.recorder.accesses

    def check_empty(self) -> None:
        """When all is over: every block is back and nobody is remembered."""
        left = (self.pool.num_blocks - self.pool.num_free, len(self.scheduler), self.worker.open_calls)
        if self.alive and any(left):
            raise Violation(f"{self.name}: lost are {left[0]} blocks, {left[1]} requests, {left[2]} calls")


class Prefill(Process):
    """A prefill worker."""

    main = "prefill"

    def __init__(
        self,
        name: str,
        address: str,
        recorder: Recorder,
        *,
        blocks: int,
        transport: str,
        salt: int,
        connect: Callable[[Process, str], Wire],
        drawn: Drawn,
    ) -> None:
        super().__init__(name, address, recorder)
        runner = self.runner = Runner(name, blocks, salt, recorder, drawn)
        generations = Generations(name, blocks, recorder)
        self.memory = ReadPool(name, runner.buffer, generations, recorder)
        self.pool = BlockPool(blocks, BLOCK, prefix_cache=False, generations=generations)
        self.scheduler = PrefillScheduler(PrefillConfig(**LIMITS), self.pool, clock=lambda: 0.0)  # type: ignore[arg-type]
        self.source = source_transport(transport, self.memory, name)  # type: ignore[arg-type]
        self.loop.settle(self._make, self.identity(blocks, transport), runner, transport, connect)

    def _make(self, identity: WorkerIdentity, runner: Runner, transport: str, connect: Any) -> None:
        self.worker = PrefillWorker(identity, self.scheduler, runner, {transport: self.source})
        self.worker._channels = WireChannels(lambda address: connect(self, address))
        self.servicer = PrefillServicer(self.worker)
        self._start()

    def kill(self) -> Accesses:
        self.source.close()
        return super().kill()


class Decode(Process):
    """A decode worker."""

    main = "decode"

    def __init__(
        self, name: str, address: str, recorder: Recorder, *, blocks: int, transport: str, salt: int, drawn: Drawn
    ) -> None:
        super().__init__(name, address, recorder)
        runner = Runner(name, blocks, salt, recorder, drawn)
        self.runner = runner
        self.memory = PoolView(runner.buffer, LAYOUT.block_bytes, blocks, memoryview(bytearray(8 * blocks)).cast("Q"))
        self.pool = BlockPool(blocks, BLOCK, prefix_cache=False, generations=self.memory.generations)
        self.scheduler = DecodeScheduler(DecodeConfig(**LIMITS), self.pool)  # type: ignore[arg-type]
        self.loop.settle(self._make, self.identity(blocks, transport), transport)

    def _make(self, identity: WorkerIdentity, transport: str) -> None:
        self.worker = DecodeWorker(identity, self.scheduler, self.runner, self.memory)
        self.servicer = DecodeServicer(self.worker)
        self.transfers = TransferServicer(self.worker, {transport: target_transport(transport)})
        self._start()

    def _step_job(self, number: int) -> None:
        """Also proves that a copy writes only into blocks that are leased."""
        before = bytes(self.runner.buffer)
        leases = self.leases()
        super()._step_job(number)
        after, size = bytes(self.runner.buffer), LAYOUT.block_bytes
        for block in range(self.runner.num_blocks):
            if before[block * size : (block + 1) * size] != after[block * size : (block + 1) * size]:
                self.recorder.write(self.name, "memory", block)
                self.check_leased(block, leases)

    def leases(self) -> list[Lease]:
        """Those whose blocks nobody else has."""
        return list(self.worker.leases._leases.values())

    def check_leased(self, block: int, leases: list[Lease]) -> None:
        """Before a copy wrote into a block it was one of these leases'."""
        if not any(block in lease.blocks for lease in leases):
            raise Violation(f"{self.name}: a copy wrote into block {block}, which is not leased")

    def check_empty(self) -> None:
        super().check_empty()
        left = (len(self.worker.leases), len(self.worker._keys), len(self.worker._transfers))
        if self.alive and any(left):
            raise Violation(f"{self.name}: left are {left[0]} leases, {left[1]} keys, {left[2]} transfers")
