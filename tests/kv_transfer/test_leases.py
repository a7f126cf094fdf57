from __future__ import annotations

import threading
from typing import Any

import pytest

from kv_transfer.leases import CommitResult, Lease, LeaseState, LeaseTable
from tandem.errors import InternalError, NotFoundError, OverloadedError, StaleError, UnavailableError

SECONDS = 10


@pytest.fixture
def released() -> list[str]:
    return []


@pytest.fixture
def table() -> LeaseTable:
    return LeaseTable("i", block_size=4, max_leases=3)


@pytest.fixture
def lease(table: LeaseTable, released: list[str]) -> Lease:
    return table.grant("r", 4, 10, [5, 6], lambda: released.append("r"), attempt=1)


def reason(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(StaleError) as caught:
        call(*args, **kwargs)
    return caught.value.reason


@pytest.mark.parametrize(("start", "end", "count"), [(4, 10, 1), (4, 10, 3), (3, 10, 3), (8, 4, 0), (-4, 4, 2)])
def test_grant_refuses_what_does_not_fit(table: LeaseTable, start: int, end: int, count: int) -> None:
    with pytest.raises(InternalError):
        table.grant("r", start, end, list(range(count)), lambda: None)
    assert len(table) == 0


def test_grant_is_bounded_and_ids_differ(table: LeaseTable) -> None:
    leases = [table.grant("r", 0, 4, [i], lambda: None) for i in range(3)]
    assert len({lease.lease_id for lease in leases}) == 3
    with pytest.raises(OverloadedError):
        table.grant("r", 0, 4, [9], lambda: None)
    table.close_all()
    assert len(table) == 0


def test_life_of_a_lease(table: LeaseTable, lease: Lease, released: list[str]) -> None:
    assert table.get(lease.lease_id) is lease
    lease.begin(1)
    with lease.copying(1) as stop:
        assert not stop()
        assert lease.copies_in_flight == 1
    assert lease.commit(1) is CommitResult.COMMITTED
    assert lease.commit(1) is CommitResult.ALREADY
    assert lease.commit(0) is CommitResult.ALREADY
    assert lease.state is LeaseState.COMMITTED
    assert released == []
    assert lease.close()
    assert not lease.close()
    assert released == ["r"]
    assert lease.committed
    assert lease.released
    assert reason(lease.commit, 1) == "LEASE_CLOSED"
    with pytest.raises(NotFoundError):
        table.get(lease.lease_id)


def test_attempts(lease: Lease) -> None:
    assert reason(lease.begin, 2) == "ATTEMPT_SUPERSEDED"
    lease.begin(1)
    assert reason(lease.begin, 1) == "ATTEMPT_TAKEN"
    assert reason(lease.retarget, 1) == "ATTEMPT_SUPERSEDED"
    assert not lease.retarget(3)
    assert lease.attempt == 3
    assert reason(lease.retarget, 2) == "ATTEMPT_SUPERSEDED"
    assert reason(lease.commit, 1) == "ATTEMPT_SUPERSEDED"
    lease.begin(3)
    assert lease.commit(3) is CommitResult.COMMITTED
    assert lease.retarget(4)
    assert lease.attempt == 3
    assert reason(lease.begin, 4) == "ALREADY_COMMITTED"
    lease.close()
    assert reason(lease.retarget, 5) == "LEASE_CLOSED"


def test_a_local_attempt_takes_no_transfer_and_commits_itself(lease: Lease) -> None:
    lease.retarget(2, local=True)
    assert reason(lease.begin, 2) == "ATTEMPT_TAKEN"
    assert lease.commit(2) is CommitResult.COMMITTED


def test_blocks_are_released_when_the_last_copy_is_over(table: LeaseTable, lease: Lease, released: list[str]) -> None:
    with lease.copying(1) as stop_outer:
        with lease.copying(1):
            lease.close()
            assert stop_outer()
            assert released == []
            with pytest.raises(NotFoundError):
                table.get(lease.lease_id)
            assert len(table) == 1
        assert released == []
        assert reason(lease.copying(1).__enter__) == "LEASE_CLOSED"
    assert released == ["r"]
    assert len(table) == 0


def test_a_failing_copy_is_over_too(lease: Lease, released: list[str]) -> None:
    def copy() -> None:
        with lease.copying(1):
            lease.close()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        copy()
    assert released == ["r"]


def test_no_commit_while_a_copy_runs(lease: Lease) -> None:
    with lease.copying(1), pytest.raises(InternalError):
        lease.commit(1)


def test_a_copy_waits_for_older_ones_and_gives_up(lease: Lease) -> None:
    with lease.copying(1) as stop:
        lease.retarget(2)
        assert stop()
        with pytest.raises(UnavailableError) as caught:
            lease.copying(2, timeout=0.01).__enter__()
        assert caught.value.reason == "COPY_IN_FLIGHT"
    with lease.copying(2):
        assert lease.copies_in_flight == 1


def test_older_copies_are_waited_for_before_the_first_of_an_attempt(lease: Lease) -> None:
    with lease.copying(1):
        lease.wait_for_older(1)
        lease.retarget(2)
        with pytest.raises(UnavailableError) as caught:
            lease.wait_for_older(2, timeout=0.01)
        assert caught.value.reason == "COPY_IN_FLIGHT"
        assert reason(lambda: lease.wait_for_older(1)) == "ATTEMPT_SUPERSEDED"
    lease.wait_for_older(2)
    lease.close()
    assert reason(lambda: lease.wait_for_older(2)) == "LEASE_CLOSED"


def wait_for_waiter(lease: Lease) -> None:
    """Until another thread waits inside `copying`."""
    for _ in range(SECONDS * 1000):
        with lease._changed:
            if lease._changed._waiters:  # type: ignore[attr-defined]
                return
        threading.Event().wait(0.001)
    raise AssertionError("nobody waits")


@pytest.mark.parametrize("ending", ["copy", "close", "retarget"])
def test_a_waiting_copy_goes_on_when_its_case_is_settled(lease: Lease, ending: str) -> None:
    result: list[str] = []

    def newer() -> None:
        try:
            with lease.copying(2, timeout=SECONDS):
                result.append(f"copied beside {lease.copies_in_flight - 1}")
        except StaleError as error:
            result.append(error.reason)

    thread = threading.Thread(target=newer)
    with lease.copying(1):
        lease.retarget(2)
        thread.start()
        wait_for_waiter(lease)
        if ending == "close":
            lease.close()
        elif ending == "retarget":
            lease.retarget(3)
        if ending != "copy":
            thread.join(SECONDS)
    thread.join(SECONDS)
    expected = {"copy": "copied beside 0", "close": "LEASE_CLOSED", "retarget": "ATTEMPT_SUPERSEDED"}
    assert result == [expected[ending]]


def test_when_quiet(lease: Lease) -> None:
    calls: list[int] = []
    lease.when_quiet(lambda: calls.append(0))
    assert calls == [0]
    with lease.copying(1):
        lease.when_quiet(lambda: calls.append(1))
        with lease.copying(1):
            pass
        assert calls == [0]
    assert calls == [0, 1]
    with lease.copying(1):
        pass
    assert calls == [0, 1]


def test_a_broken_callback_does_not_swallow_the_release(lease: Lease, released: list[str]) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    def copy() -> None:
        with lease.copying(1):
            lease.when_quiet(broken)
            lease.close()

    with pytest.raises(ZeroDivisionError):
        copy()
    assert released == ["r"]


def test_close_races_with_copies_retargets_and_commits() -> None:
    """Many threads, every interleaving the scheduler gives: released once, never under a copy, one commit at most."""
    for turn in range(150):
        table = LeaseTable("i", 4)
        under_copy: list[int] = []
        commits: list[CommitResult] = []
        calls: list[int] = []
        holder: list[Lease] = []

        def on_released(
            calls: list[int] = calls, under_copy: list[int] = under_copy, holder: list[Lease] = holder
        ) -> None:
            calls.append(1)
            under_copy.append(holder[0].copies_in_flight)

        lease = table.grant("r", 0, 8, [0, 1], on_released)
        holder.append(lease)
        start = threading.Barrier(5)

        def act(action: Any, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                action()
            except (StaleError, InternalError):
                return

        def copy(lease: Lease = lease) -> None:
            with lease.copying(0):
                pass

        actions = [
            copy,
            lambda lease=lease: lease.retarget(1),
            lambda lease=lease, commits=commits: commits.append(lease.commit(0)),
            lambda lease=lease, commits=commits: commits.append(lease.commit(1)),
            lease.close,
        ]
        threads = [threading.Thread(target=act, args=(action,)) for action in actions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert calls == [1], turn
        assert under_copy == [0]
        assert commits.count(CommitResult.COMMITTED) <= 1
        assert lease.committed == (CommitResult.COMMITTED in commits)
        assert len(table) == 0
