"""Transport within one host: the reader maps the sender's pool read-only and copies straight into its own.

Life of a source: made with a SharedPool -> listens on an abstract Unix socket (nothing named in the filesystem) ->
gives each connection of its own user that knows the endpoint's secret (`shm_handshake`) one message: greeting and the
pool's descriptor -> `close()`.
Life of a map in the target: first `connect` to an incarnation -> shared by all its transfers -> dropped when the
connection ends, that is when the source closes or dies by whatever means. Memory is unmapped when the last view or
copy lets go of it: a copy that runs while the source dies still reads valid memory.

Nothing about the memory is believed before it is checked: kind, seals (it can't shrink, so no SIGBUS), size, header.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from kv_transfer.memory import PoolReader
from kv_transfer.messages import MAX_INCARNATION, SECRET_BYTES
from kv_transfer.pool import PoolMemory, PoolView, SharedPool
from kv_transfer.shm_handshake import LONGEST_MESSAGE, ReaderHandshake, SourceHandshake
from kv_transfer.shm_map import map_pool, unsafe
from kv_transfer.watcher import SocketWatcher
from tandem.errors import (
    ConfigError,
    IncompatibleError,
    InvalidRequestError,
    PermissionDeniedError,
    StaleError,
    UnavailableError,
)
from tandem.kv_layout import KvLayout

_ENDPOINT_MAGIC = b"tandem-shm-2:"
_NAME_DIGITS = 32
_SECRET_DIGITS = 2 * SECRET_BYTES
_GREETING_MAGIC = b"TNDMSHM1"
_MAX_READERS = 256
MOST_SOURCES = 256
"""Maps that a target keeps."""
_MAX_UNPROVEN = 16
"""Connections that have not finished the handshake; a newcomer drives the oldest out."""
_CONNECT_SECONDS = 3.0
_NO_DESCRIPTOR_PAUSE_SECONDS = 0.05
_SOCKET_TYPE = socket.SOCK_SEQPACKET
_CREDENTIALS = struct.Struct("3i")
_HEXADECIMAL = frozenset(b"0123456789abcdef")


class ShmSource:
    """The sender's end."""

    name = "shm"
    max_offer_bytes = 24 << 20
    """The receiver copies several offers at once."""

    def __init__(self, pool: PoolMemory, incarnation: str) -> None:
        """Listen. Raises ConfigError unless `pool` is a SharedPool and the system has abstract Unix sockets."""
        if not isinstance(pool, SharedPool):
            raise ConfigError("transport shm needs the KV cache in a SharedPool")
        if not 1 <= len(incarnation.encode()) <= MAX_INCARNATION:
            raise ConfigError(f"an incarnation has 1 to {MAX_INCARNATION} bytes")
        self.pool: PoolMemory = pool
        self.incarnation = incarnation
        self._shared = pool
        self._name = secrets.token_hex(_NAME_DIGITS // 2)
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._unproven: OrderedDict[socket.socket, SourceHandshake] = OrderedDict()
        """Of the watcher's thread alone."""
        self._watcher = SocketWatcher("kv-shm-source")
        self._listener = socket.socket(socket.AF_UNIX, _SOCKET_TYPE)
        try:
            self._listener.bind(_address(self._name))
            self._listener.listen(64)
            self._listener.setblocking(False)
            self._watcher.watch(self._listener, self._accept)
        except OSError as error:
            self._listener.close()
            raise ConfigError(f"can't listen for readers of shared memory: {error}") from error

    def endpoint(self) -> bytes:
        """Version, random name of the socket, secret of the handshake."""
        return _ENDPOINT_MAGIC + self._name.encode() + self._secret.hex().encode()

    def offer_payload(self, blocks: Sequence[int]) -> tuple[bytes, tuple[int, ...]]:
        """Nothing rides in the stream."""
        return b"", ()

    @property
    def readers(self) -> int:
        """Connections now, in the handshake or through it."""
        return max(0, len(self._watcher) - 1)

    def close(self) -> None:
        """Stop listening and end every connection. The pool is its owner's to close. Idempotent."""
        self._watcher.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # The reader stays in the queue; don't spin until a descriptor is free.
                time.sleep(_NO_DESCRIPTOR_PAUSE_SECONDS)
            return
        try:
            if peer_uid(connection) != os.geteuid() or self.readers >= _MAX_READERS:
                connection.close()
                return
            connection.setblocking(False)
            if self._watcher.watch(connection, lambda: self._on_readable(connection)):
                self._unproven[connection] = SourceHandshake(self._secret)
        except OSError:
            # The reader went away again, or the system can't watch one more.
            connection.close()
        if len(self._unproven) > _MAX_UNPROVEN:
            self._forget(next(iter(self._unproven)))

    def _on_readable(self, connection: socket.socket) -> None:
        """A step of the handshake. A reader that is through it has nothing to say: it ended, or misbehaves."""
        handshake = self._unproven.get(connection)
        if handshake is None:
            self._forget(connection)
            return
        try:
            answer = handshake.answer(connection.recv(LONGEST_MESSAGE + 1))
            if answer:
                connection.send(answer)
            if handshake.proven:
                del self._unproven[connection]
                socket.send_fds(connection, [_GREETING_MAGIC + self.incarnation.encode()], [self._shared.read_only_fd])
        except (OSError, ConfigError, PermissionDeniedError):
            # It went away, knows no secret, or the pool is closing.
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        self._unproven.pop(connection, None)
        self._watcher.forget(connection)


class ShmTarget:
    """The receiver's end: one map per source incarnation."""

    name = "shm"
    side_by_side = True

    def __init__(self) -> None:
        """Nothing is connected yet."""
        self._lock = threading.Lock()
        self._pools: OrderedDict[tuple[bytes, str], tuple[PoolMemory, socket.socket]] = OrderedDict()
        self._watcher = SocketWatcher("kv-shm-target")

    @property
    def sources(self) -> int:
        """Maps held now."""
        return len(self._pools)

    def claims(self, endpoint: bytes) -> tuple[bytes, ...]:
        """None beside the whole: who knows a socket's name has its secret, too, or is found out."""
        return ()

    def connect(self, endpoint: bytes, source_incarnation: str, layout: KvLayout) -> PoolReader:
        """See `TargetTransport.connect`."""
        name, secret = _parse_endpoint(endpoint)
        key = (endpoint, source_incarnation)
        with self._lock:
            known = self._pools.get(key)
            if known is not None:
                self._pools.move_to_end(key)
        pool = known[0] if known is not None else self._open(name, secret, key)
        if pool.block_bytes != layout.block_bytes:
            raise IncompatibleError(f"the sender's pool has blocks of {pool.block_bytes} bytes, not {layout}")
        return PoolReader(pool)

    def _open(self, name: str, secret: bytes, key: tuple[bytes, str]) -> PoolMemory:
        connection = socket.socket(socket.AF_UNIX, _SOCKET_TYPE)
        try:
            pool = _receive_pool(connection, name, secret, key[1])
        except BaseException:
            connection.close()
            raise
        # No lock was held meanwhile: a hung source must not hold up the others. If two mapped it, the first stays.
        with self._lock:
            first, owner = self._pools.setdefault(key, (pool, connection))
        if owner is not connection:
            connection.close()
        else:
            self._watch(connection, key)
            self._forget_oldest()
        return first

    def _watch(self, connection: socket.socket, key: tuple[bytes, str]) -> None:
        """Drop the map when the connection ends. One that can't be watched isn't kept: it would outlive its source."""
        try:
            if self._watcher.watch(connection, lambda: self._drop(key, connection)):
                return
            problem = UnavailableError("this worker is closing", reason="CLOSING")
        except OSError as error:
            problem = UnavailableError(f"can't watch the sender: {error}", reason="WATCH_FAILED")
        with self._lock:
            self._pools.pop(key, None)
        raise problem

    def _forget_oldest(self) -> None:
        """Maps beyond the bound: the one used longest ago first. Views of it keep their memory; it is mapped again."""
        with self._lock:
            over = max(0, len(self._pools) - MOST_SOURCES)
            oldest = [(key, connection) for key, (_, connection) in islice(self._pools.items(), over)]
        for key, connection in oldest:
            self._drop(key, connection)

    def _drop(self, key: tuple[bytes, str], connection: socket.socket) -> None:
        with self._lock:
            if (known := self._pools.get(key)) is not None and known[1] is connection:
                del self._pools[key]
        self._watcher.forget(connection)

    def close(self) -> None:
        """Forget every source; views and copies in flight keep their memory. Idempotent."""
        self._watcher.close()
        with self._lock:
            self._pools.clear()


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end of a Unix socket, as the kernel says."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


def _address(name: str) -> bytes:
    return b"\0tandem-kv-" + name.encode()


def _parse_endpoint(endpoint: bytes) -> tuple[str, bytes]:
    """The socket's name and the secret. Only our own kind of name: a peer must not choose what this process connects
    to.
    """
    digits = endpoint.removeprefix(_ENDPOINT_MAGIC)
    size = _NAME_DIGITS + _SECRET_DIGITS
    if len(endpoint) != len(_ENDPOINT_MAGIC) + size or len(digits) != size or not set(digits) <= _HEXADECIMAL:
        raise InvalidRequestError("malformed endpoint for transport shm", field="open.endpoint")
    return digits[:_NAME_DIGITS].decode(), bytes.fromhex(digits[_NAME_DIGITS:].decode())


def _receive_pool(connection: socket.socket, name: str, secret: bytes, incarnation: str) -> PoolView:
    """Connect, check who is there, prove who is here, take the descriptor, map it."""
    handshake = ReaderHandshake(secret)
    connection.settimeout(_CONNECT_SECONDS)
    try:
        connection.connect(_address(name))
        if peer_uid(connection) != os.geteuid():
            raise IncompatibleError("the sender runs as another user", reason="PEER_CREDENTIALS")
        connection.send(handshake.hello())
        challenge = connection.recv(LONGEST_MESSAGE + 1)
        if not challenge:
            raise UnavailableError("the sender ended the connection", reason="SOURCE_GONE")
        connection.send(handshake.proof(challenge))
        greeting, fds, _, _ = socket.recv_fds(connection, len(_GREETING_MAGIC) + MAX_INCARNATION, 4)
    except OSError as error:
        raise UnavailableError(f"the sender can't be reached on this host: {error}", reason="SOURCE_GONE") from error
    try:
        if not greeting:
            raise UnavailableError("the sender ended the connection", reason="SOURCE_GONE")
        if not greeting.startswith(_GREETING_MAGIC) or len(fds) != 1:
            raise unsafe("malformed greeting")
        if greeting.removeprefix(_GREETING_MAGIC) != incarnation.encode():
            raise StaleError("another incarnation of the sender is there", reason="STALE_INCARNATION")
        return map_pool(fds[0])
    finally:
        for fd in fds:
            os.close(fd)
