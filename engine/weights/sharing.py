"""One copy of packed weights for all processes of one user on one machine.

They meet at an abstract Unix socket (nothing named in the filesystem, nothing left by a killed process) whose name
says user and key. Who binds it is the first: it packs into a memfd, seals it and hands it to everybody who connects.
Those who connect earlier wait; when the first dies meanwhile, one of them becomes it. Whoever got the memory keeps its
connection, and when that ends takes the name over, so that a worker that starts later still finds somebody.

The memory: the panels, and after them, from byte `capacity` on, a manifest in JSON. Nothing of it is believed before it
is checked: peer's user, seals (it can't shrink, so no SIGBUS), size, manifest. Whatever goes wrong, a process loads by
itself. Linux only; torch-free.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Final

from tandem.errors import IncompatibleError

logger = logging.getLogger("engine")

WAIT_SECONDS: Final = 300.0
"""How long to wait for another process that packs the same weights; then they are packed here as well."""
THREAD: Final = "weight-share"
GREETING: Final = b"TNDMWTS1"
MAX_MANIFEST_BYTES: Final = 16 << 20
_F_SEAL_FUTURE_WRITE: Final = 0x10
_CREDENTIALS: Final = struct.Struct("3i")
_MAX_HOLDERS: Final = 256
_MAX_FDS: Final = 4
_TRIES: Final = 100
_PAUSE_SECONDS: Final = 0.01


@dataclass(frozen=True, slots=True)
class Panel:
    """A packed weight [n, k] of `bits` bits: `nbytes` bytes from byte `offset` of the memory."""

    offset: int
    nbytes: int
    n: int
    k: int
    bits: int


Manifest = Mapping[str, Panel]


def join(key: str, capacity: int, wait_seconds: float = WAIT_SECONDS) -> Share | None:
    """Meet the processes with this key (any text; decides the bytes) and capacity (bytes of panels at most); blocking.

    None, after a line in the log: load alone.
    """
    if sys.platform != "linux":
        return None
    try:
        return _join(key, capacity, time.monotonic() + wait_seconds)
    except (OSError, IncompatibleError) as error:
        logger.warning("weights are not shared: %s", error)
        return None


class Share:
    """This process's part in one set of weights.

    Life of the first (`manifest` is None): memory at `fd` is filled -> `publish` -> `start` -> `close`. Of another:
    memory is mapped -> `start` -> `close`. The memory lives as long as anybody maps it; a Share holds descriptors only.
    """

    def __init__(self, key: str, capacity: int, sock: socket.socket, fd: int, manifest: Manifest | None) -> None:
        """`sock` listens if this is the first, else it leads to who gave `fd`; both are owned from now on."""
        self.fd = fd
        self.manifest = manifest
        self._key, self._capacity = key, capacity
        self._sock = sock
        self._selector: selectors.BaseSelector | None = None
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._closing = False

    def publish(self, manifest: Manifest) -> None:
        """The memory is full: nobody changes it any more, and others may have it. Raises OSError."""
        panels = {name: astuple(panel) for name, panel in manifest.items()}
        raw = json.dumps({"key": self._key, "panels": panels}).encode()
        if len(raw) > MAX_MANIFEST_BYTES or os.pwrite(self.fd, raw, self._capacity) != len(raw):
            raise OSError(errno.EFBIG, "the manifest could not be written")
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _seals())
        # A description of its own, so that whoever gets it can't write through it.
        read_only = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.close(self.fd)
        self.fd, self.manifest = read_only, manifest

    def start(self) -> None:
        """From now on a thread answers who asks, or waits to take over. Raises OSError; `close` then."""
        assert self.manifest is not None, "publish first"
        self._selector = selectors.DefaultSelector()
        wake = socket.socketpair()
        self._selector.register(wake[0], selectors.EVENT_READ, None)
        self._watch(self._sock)
        self._wake = wake
        try:
            threading.Thread(target=self._run, name=THREAD, daemon=True).start()
        except RuntimeError as error:
            self._wake = None
            wake[1].close()
            raise OSError(errno.EAGAIN, str(error)) from error

    def close(self) -> None:
        """Take no part any more. Idempotent, from any thread, also amid a garbage collection: it takes no lock and
        waits for nothing; a thread that was started ends by itself and closes what it has.
        """
        if self._closing:
            return
        self._closing = True
        if self._wake is None:
            self._let_go()
        else:
            with contextlib.suppress(OSError):
                self._wake[1].send(b"x")

    def _run(self) -> None:
        assert self._selector is not None
        try:
            while not self._closing:
                for key, _ in self._selector.select():
                    if isinstance(key.fileobj, socket.socket) and key.data is not None:
                        key.data(key.fileobj)
        except OSError as error:
            logger.warning("weights are no longer offered to other processes: %s", error)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        sockets = {self._sock, *(self._wake or ())}
        if self._selector is not None:
            sockets |= {
                key.fileobj for key in self._selector.get_map().values() if isinstance(key.fileobj, socket.socket)
            }
            self._selector.close()
        for sock in sockets:
            sock.close()
        os.close(self.fd)

    def _watch(self, sock: socket.socket) -> None:
        assert self._selector is not None
        sock.setblocking(False)
        self._sock = sock
        self._selector.register(sock, selectors.EVENT_READ, self._answer if _listens(sock) else self._await_end)

    def _answer(self, listener: socket.socket) -> None:
        """One visitor: gets the memory, and is watched till it ends."""
        assert self._selector is not None
        try:
            visitor, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # The visitor stays in the queue; don't spin until a descriptor is free.
                time.sleep(_PAUSE_SECONDS)
            return
        try:
            if peer_of(visitor)[1] != os.geteuid() or len(self._selector.get_map()) > _MAX_HOLDERS:
                visitor.close()
                return
            visitor.setblocking(False)
            socket.send_fds(visitor, [GREETING], [self.fd])
            # It has nothing to say: readable means that it ended.
            self._selector.register(visitor, selectors.EVENT_READ, self._forget)
        except OSError:
            visitor.close()

    def _forget(self, sock: socket.socket) -> None:
        assert self._selector is not None
        self._selector.unregister(sock)
        sock.close()

    def _await_end(self, connection: socket.socket) -> None:
        """Who answers for these weights said something, or ended: then this process answers, or waits for who does."""
        try:
            greeting, fd = _receive(connection)
        except BlockingIOError:
            return
        except OSError:
            greeting, fd = b"", None
        if fd is not None:
            os.close(fd)
        if greeting:
            # Weights that were packed meanwhile by a new first: the same bytes as ours, which stay mapped.
            return
        self._forget(connection)
        self._watch(_meet(_address(self._key)))


def _join(key: str, capacity: int, deadline: float) -> Share:
    while True:
        sock = _meet(_address(key))
        try:
            if _listens(sock):
                return Share(key, capacity, sock, _create_memory(capacity), None)
            sock.settimeout(max(deadline - time.monotonic(), _PAUSE_SECONDS))
            fd = _await_memory(sock)
            if fd is not None:
                return _received(key, capacity, sock, fd)
        except BaseException:
            sock.close()
            raise
        sock.close()
        if time.monotonic() >= deadline:
            raise TimeoutError("every process that began to pack them ended")
        time.sleep(_PAUSE_SECONDS)  # turned away, perhaps for good: no busy loop


def _await_memory(sock: socket.socket) -> int | None:
    """The descriptor; None when the process that packs ended. Raises TimeoutError, or IncompatibleError for rubbish."""
    try:
        greeting, fd = _receive(sock)
    except ConnectionError:
        return None
    except TimeoutError as error:
        raise TimeoutError(f"process {peer_of(sock)[0]} is still packing them") from error
    if greeting == GREETING and fd is not None:
        return fd
    if fd is not None:
        os.close(fd)
    if greeting:
        raise _refused("malformed greeting")
    return None


def _received(key: str, capacity: int, sock: socket.socket, fd: int) -> Share:
    try:
        manifest = read_manifest(fd, key, capacity)
    except BaseException:
        os.close(fd)
        raise
    logger.info("weights are those of process %d", peer_of(sock)[0])
    return Share(key, capacity, sock, fd, manifest)


def read_manifest(fd: int, key: str, capacity: int) -> dict[str, Panel]:
    """What lies where in memory from another process. Raises IncompatibleError for what isn't a memfd that is sealed
    and holds `capacity` bytes and a sound manifest for `key`.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise _refused("no memfd") from error
    if seals & _seals() != _seals():
        raise _refused("not sealed")
    size = os.fstat(fd).st_size - capacity
    if not 0 < size <= MAX_MANIFEST_BYTES:
        raise _refused(f"{size + capacity} bytes can't be {capacity} bytes of weights and a manifest")
    try:
        said = json.loads(os.pread(fd, size, capacity))
        panels = {str(name): Panel(*numbers) for name, numbers in said["panels"].items()}
        same = said["key"] == key
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _refused(f"malformed manifest: {error}") from error
    if not same:
        raise _refused("weights of another model")
    _check_places(panels, capacity)
    return panels


def _check_places(panels: Manifest, capacity: int) -> None:
    """Panels lie within the memory, one after another."""
    for name, panel in panels.items():
        if any(type(number) is not int or number < 0 for number in astuple(panel)):
            raise _refused(f"{name} can't be: {panel}")
    end = 0
    for name, panel in sorted(panels.items(), key=lambda item: item[1].offset):
        if panel.offset < end:
            raise _refused(f"{name} overlaps another")
        end = panel.offset + panel.nbytes
    if end > capacity:
        raise _refused(f"weights end at {end} of {capacity} bytes")


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end of a Unix socket, as the kernel says."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return int(pid), int(uid)


def _meet(address: bytes) -> socket.socket:
    """A socket that listens there, since nobody did; or one connected to who does. Raises OSError."""
    for _ in range(_TRIES):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            if _bind(sock, address):
                return sock
            sock.setblocking(False)  # a full queue is an error, not a wait without end
            sock.connect(address)
            if peer_of(sock)[1] != os.geteuid():
                raise PermissionError(errno.EPERM, "another user has their name")
            return sock
        except ConnectionRefusedError:
            # Who bound it does not listen yet, or has just ended.
            sock.close()
            time.sleep(_PAUSE_SECONDS)
        except BaseException:
            sock.close()
            raise
    raise ConnectionRefusedError(errno.ECONNREFUSED, "who has their name does not answer")


def _bind(sock: socket.socket, address: bytes) -> bool:
    try:
        sock.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    sock.listen(_MAX_HOLDERS)
    return True


def _listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _receive(sock: socket.socket) -> tuple[bytes, int | None]:
    """A message and its descriptor, if it has just one; b"" at the end. Raises OSError."""
    message, fds, _, _ = socket.recv_fds(sock, len(GREETING) + 1, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    if len(fds) == 1:
        return message, fds[0]
    for fd in fds:
        os.close(fd)
    return message, None


def _create_memory(nbytes: int) -> int:
    fd = os.memfd_create("tandem-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, nbytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def _seals() -> int:
    """No other size, and no writer but the maps that exist (of the first, which makes them read-only)."""
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE


def _address(key: str) -> bytes:
    """An abstract name, at most 108 bytes."""
    return f"\0tandem-weights-{os.geteuid()}-{key[:64]}".encode()


def _refused(what: str) -> IncompatibleError:
    return IncompatibleError(f"another process's memory is refused: {what}", reason="UNSAFE_MEMORY")
