"""Everything at once, in any order: offers, copies that pause anywhere, reuse of blocks, retargets, commits and closes.

Copies run in threads that stop between the generation check and the copying of each block until a rule lets them go
on, so hypothesis decides every interleaving and can repeat it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kv_transfer.leases import LeaseState, LeaseTable
from kv_transfer.memory import MemorySource, MemoryTarget, PoolReader
from kv_transfer.pool import LocalPool, PoolMemory
from kv_transfer.session import CopyPlan, Receiver, ReceiveSession, Sender, SendSession
from tandem.errors import InternalError, StaleError, UnavailableError
from tandem.kv_layout import KvLayout
from tandem.record import OutputState, Record, SamplingParams, StopRules

LAYOUT = KvLayout(block_size=2, dtype="float16", num_layers=1, num_kv_heads=1, head_dim=4)
UNLIKE = replace(LAYOUT, block_size=3)
BLOCKS = 6
NEEDED = (2, 11)
SECONDS = 20


class PausingCopy(threading.Thread):
    """One `ReceiveSession.copy` that goes one block per `step`."""

    def __init__(self, session: ReceiveSession, plan: CopyPlan) -> None:
        super().__init__(daemon=True)
        self.session, self.plan = session, plan
        self.ack: Any = None
        self.error: Exception | None = None
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        try:
            self.ack = self.session.copy(self.plan)
        except Exception as error:
            self.error = error
        self.over = True
        self._paused.release()

    over = False

    def pause(self) -> None:
        self._paused.release()
        assert self._go.acquire(timeout=SECONDS)

    def begin(self) -> None:
        self.start()
        assert self._paused.acquire(timeout=SECONDS)

    def step(self) -> None:
        self._go.release()
        assert self._paused.acquire(timeout=SECONDS)


class PausingPool:
    """A sender's pool whose bytes a copying thread gets only when it may go on."""

    def __init__(self, pool: PoolMemory) -> None:
        self.pool = pool
        self.block_bytes, self.num_blocks, self.generations = pool.block_bytes, pool.num_blocks, pool.generations

    @property
    def buffer(self) -> memoryview:
        thread = threading.current_thread()
        if isinstance(thread, PausingCopy):
            thread.pause()
        return self.pool.buffer


class PausingTarget(MemoryTarget):
    def connect(self, endpoint: bytes, source_incarnation: str, layout: KvLayout) -> PoolReader:
        view = super().connect(endpoint, source_incarnation, layout)
        return PoolReader(PausingPool(view._require_pool()))


def content(layout: KvLayout, position: int) -> np.ndarray:
    """What the KV of the block at `position` must be, whoever computed it: uint16 [2, block_size, head_dim]."""
    keys, slots, dims = np.indices((2, layout.block_size, layout.head_dim))
    return (100 * (layout.block_size * position + slots) + 10 * keys + dims).astype(np.uint16)


def block_of(pool: PoolMemory, layout: KvLayout, block: int) -> np.ndarray:
    """One block's codes: a view shaped as `content`."""
    shape = (BLOCKS, 2, layout.block_size, layout.head_dim)
    codes: np.ndarray = np.frombuffer(pool.buffer, np.uint16).reshape(shape)[block]
    return codes


class Attempt:
    """A sender with its own pool, whose blocks hold the right content until they are reused."""

    def __init__(self, machine: TransferMachine, number: int) -> None:
        self.number = number
        self.layout = machine.source_layout
        self.pool = LocalPool(BLOCKS, self.layout.block_bytes)
        for block in range(BLOCKS):
            self.pool.generations[block] = 10 * number
            block_of(self.pool, self.layout, block)[:] = content(self.layout, block)
        self.source = MemorySource(self.pool, f"s{number}")
        self.source.max_offer_bytes = 2 * self.layout.block_bytes
        self.send = SendSession(
            Sender(f"s{number}", "m", "n", self.layout),
            self.source,
            lease_id=machine.lease.lease_id,
            attempt=number,
            target_incarnation="t",
            window=2,
        )
        self.receive = ReceiveSession(machine.receiver, 2)
        self.failed = False
        self.ready = 0

    def guard(self, action: Callable[[], Any]) -> Any:
        """An error ends the stream, as a servicer would."""
        try:
            return action()
        except (StaleError, UnavailableError):
            self.end()
            return None

    def end(self) -> None:
        self.failed = True
        self.receive.close()


class TransferMachine(RuleBasedStateMachine):
    source_layout = LAYOUT
    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.target_pool = LocalPool(BLOCKS, LAYOUT.block_bytes)
        self.receiver = Receiver(
            LeaseTable("t", LAYOUT.block_size),
            self.target_pool,
            LAYOUT,
            "m",
            "n",
            {"memory": PausingTarget()},
            copy_wait_seconds=0.0,
        )
        self.released: list[int] = []
        self.blocks = [4, 0, 3, 1, 2]
        self.lease = self.receiver.leases.grant("r", *NEEDED, self.blocks, self.on_released)
        self.last = 0
        self.running: list[PausingCopy] = []
        self.all: list[Attempt] = []
        self.commits: list[int] = []

    def on_released(self) -> None:
        self.released.append(self.lease._in_flight.total())

    def add(self) -> Attempt:
        attempt = Attempt(self, self.last)
        self.all.append(attempt)
        opened = attempt.guard(lambda: attempt.receive.on_open(attempt.send.open()))
        if opened is not None:
            attempt.send.on_opened(opened)
        return attempt

    @precondition(lambda self: not self.all and self.lease.state is LeaseState.RECEIVING)
    @rule(target=attempts)
    def first_attempt(self) -> Attempt:
        return self.add()

    @precondition(lambda self: self.lease.state is not LeaseState.CLOSED and self.last < 4)
    @rule(target=attempts)
    def retarget(self) -> Attempt:
        committed = self.lease.retarget(self.last + 1)
        assert committed == bool(self.commits)
        self.last += 1
        return self.add()

    @rule(attempt=attempts, tokens=st.integers(1, 11))
    def compute(self, attempt: Attempt, tokens: int) -> None:
        attempt.ready = min(11, attempt.ready + tokens)
        attempt.send.ready(attempt.ready, list(range(BLOCKS)))

    @rule(attempt=attempts)
    def offer(self, attempt: Attempt) -> None:
        self.begin_copy(attempt)

    def begin_copy(self, attempt: Attempt) -> bool:
        """True when something was offered."""
        if attempt.failed:
            return False
        offer = attempt.guard(attempt.send.next_offer)
        plan = attempt.guard(lambda: attempt.receive.on_offer(offer)) if offer is not None else None
        if plan is None:
            return False
        copy = PausingCopy(attempt.receive, plan)
        copy.begin()
        self.running.append(copy)
        self.settle(copy, attempt)
        return True

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 3))
    def go_on(self, which: int) -> None:
        self.step(self.running[which % len(self.running)])

    def step(self, copy: PausingCopy) -> None:
        copy.step()
        self.settle(copy, self.owner(copy))

    def owner(self, copy: PausingCopy) -> Attempt:
        return next(attempt for attempt in self.all if attempt.receive is copy.session)

    def settle(self, copy: PausingCopy, attempt: Attempt) -> None:
        """Take note if the copy is over."""
        if not copy.over:
            return
        copy.join(SECONDS)
        self.running.remove(copy)
        if copy.ack is not None:
            attempt.send.on_ack(copy.ack)
        else:
            assert isinstance(copy.error, StaleError | UnavailableError), copy.error
            attempt.end()

    @rule(attempt=attempts, block=st.integers(0, BLOCKS - 1))
    def reuse(self, attempt: Attempt, block: int) -> None:
        if block < attempt.layout.blocks_for(attempt.ready):  # what is yet to be computed is held
            self.hand_out(attempt, block)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 3), block=st.integers(0, 1))
    def reuse_under_a_copy(self, which: int, block: int) -> None:
        copy = self.running[which % len(self.running)]
        blocks = copy.plan.offer.blocks
        self.hand_out(self.owner(copy), blocks[block % len(blocks)])

    def hand_out(self, attempt: Attempt, block: int) -> None:
        attempt.pool.generations[block] += 1
        block_of(attempt.pool, attempt.layout, block)[:] = 0xEEEE

    @rule(attempt=attempts)
    def commit(self, attempt: Attempt) -> None:
        if attempt.failed or not attempt.send.all_offered or attempt.number in self.commits:
            return
        record = Record("r", "m", [1], SamplingParams(), StopRules(1), [OutputState([1])])
        copying = any(copy.session is attempt.receive for copy in self.running)
        try:
            committed = attempt.receive.on_commit(attempt.send.commit(record))
        except InternalError:
            assert copying
            attempt.end()
        except StaleError:
            attempt.end()
        else:
            assert attempt.send.on_committed(committed) == (not self.commits)
            attempt.end()
            if not committed.already_committed:
                self.commits.append(attempt.number)
                assert attempt.number == self.lease.attempt

    @rule(attempt=attempts)
    def finish(self, attempt: Attempt) -> None:
        """All that is left of a transfer, undisturbed."""
        self.compute(attempt, 11)
        while not attempt.failed:
            for copy in [copy for copy in self.running if copy.session is attempt.receive]:
                while copy in self.running:
                    self.step(copy)
            if not self.begin_copy(attempt):
                break
        self.commit(attempt)

    @rule(attempt=attempts)
    def break_stream(self, attempt: Attempt) -> None:
        attempt.end()

    @rule()
    def close(self) -> None:
        self.lease.close()

    @invariant()
    def released_exactly_once_and_never_under_a_copy(self) -> None:
        due = self.lease.state is LeaseState.CLOSED and not self.running
        assert self.released == ([0] if due else [])
        assert self.lease._in_flight.total() == len(self.running)
        assert len(self.receiver.leases) == (0 if due else 1)

    @invariant()
    def what_was_committed_is_right_and_stays_right(self) -> None:
        assert len(self.commits) <= 1
        if self.commits:
            for position, block in enumerate(self.blocks, NEEDED[0] // LAYOUT.block_size):
                tokens = min(LAYOUT.block_size, NEEDED[1] - position * LAYOUT.block_size)
                got = block_of(self.target_pool, LAYOUT, block)[:, :tokens]
                assert np.array_equal(got, content(LAYOUT, position)[:, :tokens])

    def teardown(self) -> None:
        self.lease.close()
        for copy in list(self.running):
            while not copy.over:
                copy.step()
            copy.join(SECONDS)
            self.running.remove(copy)
        self.released_exactly_once_and_never_under_a_copy()
        for attempt in self.all:
            attempt.source.close()


class UnlikeMachine(TransferMachine):
    """The senders' blocks are larger, and begin elsewhere: everything is staged and converted."""

    source_layout = UNLIKE


def run(machine: Any, examples: int, phases: tuple[Phase, ...] = tuple(Phase)) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            phases=phases,
            stateful_step_count=40,
            report_multiple_bugs=False,  # the first one is enough
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("machine", [TransferMachine, UnlikeMachine])
def test_any_order_of_events(machine: type[TransferMachine]) -> None:
    run(machine, 150)


def reuse_before_the_bytes(machine: TransferMachine) -> None:
    """A block goes to somebody else between its check and its copy."""
    attempt = machine.first_attempt()
    machine.compute(attempt, 11)
    machine.offer(attempt)
    machine.reuse_under_a_copy(0, 0)
    machine.finish(attempt)


def older_copy_goes_on(machine: TransferMachine) -> None:
    """As before, but by then another attempt has committed."""
    old = machine.first_attempt()
    machine.compute(old, 11)
    machine.offer(old)
    new = machine.retarget()
    machine.finish(new)
    machine.reuse_under_a_copy(0, 0)
    while machine.running:
        machine.go_on(0)


def play(kind: type[TransferMachine], script: Callable[[TransferMachine], None]) -> None:
    """One order of events, with the invariants after it."""
    machine = kind()
    try:
        script(machine)
        machine.what_was_committed_is_right_and_stays_right()
        machine.released_exactly_once_and_never_under_a_copy()
    finally:
        machine.teardown()


@pytest.mark.parametrize(
    ("machine", "script"),
    [
        (TransferMachine, reuse_before_the_bytes),
        (UnlikeMachine, reuse_before_the_bytes),
        # By way of staging such a copy is found out before it writes: that pair needs both faults.
        (TransferMachine, older_copy_goes_on),
    ],
)
def test_the_machine_sees_what_it_looks_for(
    monkeypatch: pytest.MonkeyPatch,
    machine: type[TransferMachine],
    script: Callable[[TransferMachine], None],
) -> None:
    """Take one protection away and the machine must fail: otherwise its passing would say nothing."""
    play(machine, script)
    if script is reuse_before_the_bytes:
        monkeypatch.setattr("kv_transfer.copying._check_generation", lambda *_: None)
        monkeypatch.setattr("kv_transfer.memory.check_generations", lambda *_: None)
    else:
        monkeypatch.setattr(
            "kv_transfer.leases.Lease._begin_copy",
            lambda self, attempt, timeout: self._in_flight.update([attempt]),
        )
        monkeypatch.setattr("kv_transfer.leases.Lease.copies_in_flight", property(lambda self: 0))
    with pytest.raises(AssertionError, match="array_equal"):
        play(machine, script)
