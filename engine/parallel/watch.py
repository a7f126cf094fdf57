"""Notices on rank 0 that another rank has ended, also while nothing is computed."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Sequence


class Watch:
    """Life cycle: made once all ranks are ready, when none has anything to say any more -> `stop`."""

    def __init__(self, lines: Sequence[socket.socket], on_end: Callable[[int], None]) -> None:
        """`lines` to ranks 1 and up; `on_end` is called with the first rank that ends, in the watching thread."""
        self._lines = {line.fileno(): rank for rank, line in enumerate(lines, 1)}
        self._on_end = on_end
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._main, name="rank-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Whoever ends from now on may. Idempotent."""
        self._wake.close()
        self._thread.join()
        self._woken.close()

    def _main(self) -> None:
        poll = select.poll()
        for fd in (*self._lines, self._woken.fileno()):
            poll.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll()]
        if self._woken.fileno() not in ready:
            self._on_end(self._lines[ready[0]])
