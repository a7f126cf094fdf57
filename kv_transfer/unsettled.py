"""Memory that may be written though the copy into it has failed: it stays lent until nobody can write it any more.

Life of a failed read: `UnsettledError` goes up through whoever lent memory to the copy, each of whom keeps it by
`lent` -> the reads are over -> `Unsettled.settle`, and each gives it back. A copy that ends well, or by an
error of another kind, has left nothing under way: what was lent to it is given back at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tandem.errors import UnavailableError

Callback = Callable[[], None]


class Unsettled:
    """Reads that may still write. Thread-safe."""

    def __init__(self) -> None:
        """They may."""
        self._lock = threading.Lock()
        self._callbacks: list[Callback] | None = []

    def when_settled(self, callback: Callback) -> None:
        """Call back once they can't write any more: now, or from the thread that finds out."""
        with self._lock:
            if self._callbacks is not None:
                self._callbacks.append(callback)
                return
        callback()

    def settle(self) -> None:
        """They can't any more. Idempotent; every callback runs once, even if another raises."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks or [], None
        with ExitStack() as stack:
            for callback in reversed(callbacks):
                stack.callback(callback)


class UnsettledError(UnavailableError):
    """The sender can't be read any more, and what was asked of it before may still arrive."""

    def __init__(self, message: str, *, reason: str, reads: Unsettled) -> None:
        """`reads` that may arrive."""
        super().__init__(message, reason=reason)
        self.reads = reads


@contextmanager
def lent(give_back: Callback) -> Iterator[None]:
    """Around a copy into memory: `give_back` is called at its end; after an UnsettledError, once that is settled."""
    try:
        yield
    except UnsettledError as error:
        error.reads.when_settled(give_back)
        raise
    except BaseException:
        give_back()
        raise
    else:
        give_back()
