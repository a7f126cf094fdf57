"""A sender that hangs takes one copy thread, and no thread that opens or commits wait for."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from decode_service.transfer_threads import Threads
from kv_transfer.staging import COPY_THREADS

SECONDS = 20.0


class Copies:
    """Copies that hang until they are let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.running = 0
        self.most = 0
        self.began = threading.Semaphore(0)
        self._lock = threading.Lock()

    def copy(self) -> str:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.began.release()
        assert self.go.wait(SECONDS)
        with self._lock:
            self.running -= 1
        return "copied"

    async def until_running(self) -> None:
        assert await asyncio.to_thread(self.began.acquire, timeout=SECONDS)


@pytest_asyncio.fixture
async def threads() -> AsyncIterator[Threads]:
    made = Threads()
    yield made
    await asyncio.to_thread(made.close)


async def test_a_sender_that_hangs_takes_one_thread_from_the_others(threads: Threads) -> None:
    hung = Copies()
    waiting = [asyncio.create_task(threads.copy(hung.copy, "hung")) for _ in range(2 * COPY_THREADS)]
    await hung.until_running()
    for turn in ("another", None):
        copies = [threads.copy(lambda: "copied", turn) for _ in range(2 * COPY_THREADS)]
        assert await asyncio.wait_for(asyncio.gather(*copies), SECONDS) == ["copied"] * (2 * COPY_THREADS)
    assert await asyncio.wait_for(threads.talk(lambda: "opened"), SECONDS) == "opened"
    assert hung.running == 1
    hung.go.set()
    assert await asyncio.wait_for(asyncio.gather(*waiting), SECONDS) == ["copied"] * (2 * COPY_THREADS)
    assert hung.most == 1


async def test_a_copy_that_nobody_waits_for_keeps_its_turn(threads: Threads) -> None:
    first, second = Copies(), Copies()
    given_up = asyncio.create_task(threads.copy(first.copy, "sender"))
    await first.until_running()
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    waiting = asyncio.create_task(threads.copy(second.copy, "sender"))
    await threads.copy(lambda: None, None)
    assert second.running == 0
    first.go.set()
    second.go.set()
    assert await asyncio.wait_for(waiting, SECONDS) == "copied"


async def test_what_fails_when_nobody_waits_any_more_is_no_complaint(threads: Threads) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    copies = Copies()

    def fail() -> None:
        copies.copy()
        raise ZeroDivisionError

    given_up = asyncio.create_task(threads.copy(fail, "sender"))
    await copies.until_running()
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    copies.go.set()
    assert await threads.copy(lambda: "copied", "sender") == "copied"
    gc.collect()
    assert complaints == []


async def test_without_turns_copies_go_side_by_side(threads: Threads) -> None:
    copies = Copies()
    waiting = [asyncio.create_task(threads.copy(copies.copy, None)) for _ in range(COPY_THREADS)]
    for _ in waiting:
        await copies.until_running()
    assert copies.most == COPY_THREADS
    copies.go.set()
    await asyncio.gather(*waiting)


async def test_a_copy_that_fails_gives_its_turn_on(threads: Threads) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await threads.copy(fail, "sender")
    assert await asyncio.wait_for(threads.copy(lambda: "copied", "sender"), SECONDS) == "copied"
