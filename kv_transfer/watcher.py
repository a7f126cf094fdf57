"""One thread that waits for sockets to become readable: new readers at a source's listener, and ends of connections.

Life: made idle -> the first `watch` starts the thread -> `close` stops it, joins it and closes every watched socket.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable


class SocketWatcher:
    """Calls `on_readable()` from its thread for each watched socket that has something to read, or has ended.

    Thread-safe.
    """

    def __init__(self, name: str) -> None:
        """`name` of the thread."""
        self._name = name
        self._lock = threading.Lock()
        self._selector: selectors.BaseSelector | None = None
        self._thread: threading.Thread | None = None
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._watched: dict[socket.socket, Callable[[], None]] = {}
        self._closed = False

    def watch(self, sock: socket.socket, on_readable: Callable[[], None]) -> bool:
        """Own `sock` from now on. False after `close` (the socket is closed then).

        Raises OSError when the system can't watch it (descriptors, memory); the socket is closed then, too.
        """
        with self._lock:
            if self._closed:
                sock.close()
                return False
            try:
                self._start().register(sock, selectors.EVENT_READ, on_readable)
            except OSError:
                sock.close()
                raise
            self._watched[sock] = on_readable
            return True

    def forget(self, sock: socket.socket) -> None:
        """Close one socket and watch it no more. Idempotent."""
        with self._lock:
            if self._watched.pop(sock, None) is not None and self._selector is not None:
                self._selector.unregister(sock)
                sock.close()

    def __len__(self) -> int:
        """Sockets watched."""
        with self._lock:
            return len(self._watched)

    def _start(self) -> selectors.BaseSelector:
        """The selector of the running thread."""
        if self._selector is not None:
            return self._selector
        with contextlib.ExitStack() as undo:
            selector = undo.enter_context(selectors.DefaultSelector())
            wake = socket.socketpair()
            for end in wake:
                undo.enter_context(end)
            selector.register(wake[0], selectors.EVENT_READ, None)
            undo.pop_all()
        self._selector, self._wake = selector, wake
        self._thread = threading.Thread(target=self._run, args=(selector,), name=self._name, daemon=True)
        self._thread.start()
        return selector

    def _run(self, selector: selectors.BaseSelector) -> None:
        while not self._closed:
            for key, _ in selector.select():
                # None is the wake-up; a socket forgotten since the select has nothing to say any more.
                if key.data is not None and key.fileobj in self._watched:
                    key.data()

    def close(self) -> None:
        """Stop. Idempotent; not to be called from `on_readable`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread, selector, wake = self._thread, self._selector, self._wake
            sockets = list(self._watched)
            self._watched.clear()
            self._selector = None
        if thread is not None and wake is not None and selector is not None:
            wake[1].send(b"x")
            thread.join()
            selector.close()
            for sock in (*wake, *sockets):
                with contextlib.suppress(OSError):
                    sock.close()
