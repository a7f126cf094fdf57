"""The hand-off under every schedule of small worlds: offer, copy, commit, retarget, cancel, a sender that hangs and
comes back late, restarts. What must not be says `world`, `watch` and `processes`; `explorer` says what "every" means.

One trouble comes in each world, at every moment; pools are so small that what is given up is handed out again at once.
A protection that is taken away must be missed: the explorer has to find a schedule that shows it. `--model-deep` has
larger worlds, which take minutes.

Worlds differ in how blocks travel. In one memory, by the reader that shared memory has. In the stream, where a byte may
be another when it arrives. Over a network (`network`), where reads also hang, and arrive long after they were given up.
Not explored are the connections of shared memory and of NIXL themselves, which tests of their own make between real
processes, nor conversion, which tests/kv_transfer/test_state_machine.py has in its orders.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import structlog
import watch
from asks import Plan
from explorer import Explorer
from world import maker

from kv_transfer import copying, grpc, leases
from kv_transfer.leases import CommitResult, Lease, LeaseState
from kv_transfer.memory import PoolReader
from kv_transfer.pool import PoolMemory

SMALL = Plan(prompts=(2,), max_tokens=1, prefill_blocks=1, decode_blocks=2)
"""One block is sent."""
WORLDS = {
    "given up while another prompt waits for the sender's block": (replace(SMALL, cancel=True, busy=True), 1000),
    "given up while another request waits for the receiver's blocks": (
        replace(SMALL, cancel=True, prompts=(2, 2)),
        2500,
    ),
    "the receiver computes itself, the sender hangs and comes back": (
        replace(SMALL, retarget="local"),
        800,
    ),
    "the sender restarts": (replace(SMALL, restart="P1"), 1500),
    "bytes in the stream, given up": (replace(SMALL, transport="grpc", cancel=True), 300),
    "bytes in the stream, one of them another": (replace(SMALL, transport="grpc", corrupt=True), 40),
    "over a network, a read hangs": (replace(SMALL, transport="nixl", hang=True), 250),
    "over a network, one byte is another": (replace(SMALL, transport="nixl", corrupt=True), 100),
}
"""Each with fewer schedules than it must have: less would say that something is not explored any more."""
DEEP = {
    "the receiver computes itself while another prompt waits for the late sender's block": replace(
        SMALL, retarget="local", busy=True, max_tokens=2
    ),
    "another sender, the first hangs and comes back": replace(SMALL, senders=2, retarget="P2"),
    "the receiver restarts": replace(SMALL, restart="D", max_tokens=2),
    "two blocks, given up": replace(SMALL, prompts=(3,), prefill_blocks=2, max_tokens=2, decode_blocks=3, cancel=True),
    "over a network, given up while a read hangs": replace(SMALL, transport="nixl", cancel=True, hang=True),
    "over a network, the receiver computes itself while a read hangs": replace(
        SMALL, transport="nixl", retarget="local", hang=True
    ),
    "over a network, the sender restarts while a read hangs": replace(SMALL, transport="nixl", restart="P1", hang=True),
    "bytes in the stream, given up while another prompt waits": replace(
        SMALL, transport="grpc", cancel=True, busy=True, sender_threads=True
    ),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Workers log every failed step; here failures are the point."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


def explore(plan: Plan, monkeypatch: pytest.MonkeyPatch, most_schedules: int | None = None) -> Explorer:
    """Watches, with whatever protection was taken away before."""
    watch.install(monkeypatch)
    explorer = Explorer(maker(plan), most_schedules=most_schedules)
    explorer.explore()
    return explorer


@pytest.mark.parametrize("name", WORLDS)
def test_every_schedule_keeps_the_promises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, floor = WORLDS[name]
    report = explore(plan, monkeypatch).report
    print(f"{report.schedules} schedules, {report.states} states, at most {report.longest} events")
    assert not report.traces, report.describe()
    assert report.exhaustive
    assert report.schedules > floor
    assert report.states > 5 * floor


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.timeout(7200)
def test_every_schedule_of_larger_worlds(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--model-deep"):
        pytest.skip("larger worlds are explored with --model-deep")
    report = explore(DEEP[name], monkeypatch).report
    print(f"{report.schedules} schedules, {report.states} states, at most {report.longest} events")
    assert not report.traces, report.describe()
    assert report.exhaustive
    assert report.schedules > 1000


# -- protections that are taken away


def no_check_after_the_copy(patch: pytest.MonkeyPatch) -> None:
    copy, check = copying.copy_bytes, copying._check_generation
    copied = False

    def copy_bytes(source: memoryview, target: PoolMemory, block: int) -> None:
        nonlocal copied
        copy(source, target, block)
        copied = True

    def check_generation(*arguments: object) -> None:
        nonlocal copied
        if not copied:
            check(*arguments)  # type: ignore[arg-type]
        copied = False

    patch.setattr(copying, "copy_bytes", copy_bytes)
    patch.setattr(copying, "_check_generation", check_generation)


def no_check_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PoolReader, "verify", lambda *_: None)


def no_check_of_generations(patch: pytest.MonkeyPatch) -> None:
    no_check_before_the_commit(patch)
    patch.setattr(copying, "_check_generation", lambda *_: None)


def no_compare_and_set(patch: pytest.MonkeyPatch) -> None:
    def commit(self: Lease, attempt: int) -> CommitResult:
        if self._state is not LeaseState.CLOSED:
            self._state = LeaseState.COMMITTED
        self._committed = True
        return CommitResult.COMMITTED

    patch.setattr(Lease, "commit", commit)


def blocks_are_freed_under_a_copy(patch: pytest.MonkeyPatch) -> None:
    take_due = Lease._take_due

    def take_at_once(self: Lease) -> list[Callable[[], None]]:
        in_flight = self._in_flight.copy()
        self._in_flight.clear()
        due = take_due(self)
        self._in_flight.update(in_flight)
        return due

    patch.setattr(Lease, "_take_due", take_at_once)


def a_retarget_keeps_the_attempt(patch: pytest.MonkeyPatch) -> None:
    retarget = Lease.retarget

    def keep(self: Lease, attempt: int, *, local: bool = False) -> bool:
        before = self._attempt
        over = retarget(self, attempt, local=local)
        self._attempt = before
        return over

    patch.setattr(Lease, "retarget", keep)


def no_waiting_for_older_copies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lease, "when_quiet", lambda self, callback: callback())


def blocks_are_free_though_a_read_may_arrive(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def lent(give_back: Callable[[], None]) -> Iterator[None]:
        try:
            yield
        finally:
            give_back()

    patch.setattr(leases, "lent", lent)


def no_checksums(patch: pytest.MonkeyPatch) -> None:
    """Both ends say the same of any bytes."""
    for module in (copying, grpc):
        patch.setattr(module, "zlib", SimpleNamespace(crc32=lambda _: 0))


GIVEN_UP = replace(SMALL, cancel=True)
HANGING = replace(SMALL, transport="nixl", hang=True)
FLIPPED = replace(SMALL, corrupt=True)
LATE = replace(SMALL, retarget="local", busy=True)
MUTANTS = [
    (no_check_after_the_copy, LATE, "an acknowledged block holds foreign bytes"),
    (no_check_before_the_commit, LATE, "committed though the sender had handed out"),
    (no_check_of_generations, LATE, "committed though the sender had handed out"),
    (no_compare_and_set, replace(SMALL, retarget="local"), "had taken its place"),
    (blocks_are_freed_under_a_copy, GIVEN_UP, "is not leased"),
    (a_retarget_keeps_the_attempt, replace(SMALL, retarget="local"), "had taken its place"),
    (no_waiting_for_older_copies, replace(LATE, max_tokens=2), "cached tokens are not the sequence's"),
]
MUTANTS += [
    (blocks_are_free_though_a_read_may_arrive, replace(HANGING, cancel=True), "is not leased"),
    (no_checksums, replace(FLIPPED, transport="nixl"), "an acknowledged block holds foreign bytes"),
    (no_checksums, replace(FLIPPED, transport="grpc"), "an acknowledged block holds foreign bytes"),
]
SLOW = {no_waiting_for_older_copies}
"""Found after ten seconds: with --model-deep."""


@pytest.mark.parametrize(("fault", "plan", "says"), MUTANTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_missing_protection_is_found(
    fault: Callable[[pytest.MonkeyPatch], None],
    plan: Plan,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if fault in SLOW and not request.config.getoption("--model-deep"):
        pytest.skip("found with --model-deep")
    fault(monkeypatch)
    report = explore(plan, monkeypatch, most_schedules=5000).report
    assert report.traces, f"{report.schedules} schedules show nothing"
    print(f"{fault.__name__}, after {report.schedules} schedules:\n{report.describe()}")
    assert says in report.shortest[1]
