"""The threads that transfers into this worker wait and copy in. Used from the event loop.

Copies have a few threads for all senders. Where a copy waits for its sender (`ReceiveSession.turn`), at most one of
that sender's is among them, so a sender that hangs takes one thread from the others, for as long as a read may take.
Opens and commits, which may wait for a sender as well, have threads of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

from kv_transfer.staging import COPY_THREADS

TALK_THREADS = 8
_T = TypeVar("_T")


class Threads:
    """Life: made idle -> `talk` and `copy` -> `close`, when nobody uses it any more."""

    def __init__(self) -> None:
        """Threads start when they are needed."""
        self._talk = ThreadPoolExecutor(TALK_THREADS, thread_name_prefix="kv-talk")
        self._copy = ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="kv-copy")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def talk(self, work: Callable[[], _T]) -> _T:
        """Run an open or a commit."""
        return await asyncio.get_running_loop().run_in_executor(self._talk, work)

    async def copy(self, work: Callable[[], _T], turn: str | None) -> _T:
        """Run a copy; those of one turn one after another."""
        loop = asyncio.get_running_loop()
        if turn is None:
            return await loop.run_in_executor(self._copy, work)
        lock = self._turns.setdefault(turn, asyncio.Lock())
        await lock.acquire()
        try:
            running = loop.run_in_executor(self._copy, work)
        except BaseException:
            lock.release()
            raise

        def over(done: asyncio.Future[_T]) -> None:
            lock.release()
            if not done.cancelled():
                done.exception()  # looked at, for perhaps nobody waits any more

        running.add_done_callback(over)
        # Shielded: whoever waits may be cancelled, and the thread copies on, in its turn.
        return await asyncio.shield(running)

    def close(self) -> None:
        """What runs is waited for, what waits is dropped. Blocking."""
        for executor in (self._talk, self._copy):
            executor.shutdown(wait=True, cancel_futures=True)
