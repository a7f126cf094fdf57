"""The sockets between rank 0 and the other ranks: steps go out, and whoever ends is noticed at once. Torch-free.

Life of a line: rank 0 listens under a random abstract name and tells it through the process group -> each rank calls
and says its number -> messages and descriptors while they load -> from then on only rank 0 speaks -> an empty message
is the end. A socket that ends otherwise means that its process has.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from typing import Final

from tandem.errors import ConfigError

MOST_BYTES: Final = 64 << 20
"""Of a message."""
SECONDS: Final = 60.0
"""How long ranks that have found each other wait for each other's call."""
NAME_BYTES: Final = 16
_LENGTH: Final = struct.Struct("<I")
_CREDENTIALS: Final = struct.Struct("3i")


def listen(name: bytes, backlog: int) -> socket.socket:
    """Rank 0's end. Raises ConfigError where the system has no such sockets."""
    if not hasattr(socket, "SO_PEERCRED"):
        raise ConfigError("WORLD_SIZE: several ranks need Linux")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(_address(name))
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise ConfigError(f"can't listen for the other ranks: {error}") from error
    return listener


def accept_ranks(listener: socket.socket, size: int) -> list[socket.socket]:
    """The lines to ranks 1 to size - 1, in order. Raises ConfigError when they don't all call in time."""
    lines: dict[int, socket.socket] = {}
    listener.settimeout(SECONDS)
    try:
        while len(lines) < size - 1:
            line, _ = listener.accept()
            line.settimeout(SECONDS)
            rank = receive(line) if _is_ours(line) else None
            if not rank or not 1 <= rank[0] < size or rank[0] in lines:
                line.close()  # nobody of ours
                continue
            line.settimeout(None)
            lines[rank[0]] = line
    except OSError as error:
        for line in lines.values():
            line.close()
        raise ConfigError(f"of {size} ranks only {sorted([0, *lines])} called rank 0: {error}") from error
    return [lines[rank] for rank in sorted(lines)]


def call_leader(name: bytes, rank: int) -> socket.socket:
    """The line from rank `rank` to rank 0. Raises ConfigError."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.connect(_address(name))
        if not _is_ours(line):
            raise OSError("another user answers in its place")
        send(line, bytes([rank]))
    except OSError as error:
        line.close()
        raise ConfigError(f"rank {rank} can't call rank 0: {error}; are they on one machine?") from error
    return line


def send(line: socket.socket, message: bytes) -> None:
    """Send one message. Raises OSError when the other end has gone."""
    line.sendall(_LENGTH.pack(len(message)) + message)


def receive(line: socket.socket) -> bytearray | None:
    """The next message; None when the other end has gone, or sends what no message is."""
    head = _read(line, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    return _read(line, length) if length <= MOST_BYTES else None


def send_descriptor(line: socket.socket, fd: int) -> None:
    """Give a descriptor away. Raises OSError."""
    socket.send_fds(line, [b"\0"], [fd])


def receive_descriptor(line: socket.socket) -> int | None:
    """A descriptor, the caller's to close; None when the other end has gone."""
    try:
        data, fds, _, _ = socket.recv_fds(line, 1, 1)
    except OSError:
        return None
    return fds[0] if data and fds else None


def _read(line: socket.socket, count: int) -> bytearray | None:
    data = bytearray(count)
    view, got = memoryview(data), 0
    try:
        while got < count:
            read = line.recv_into(view[got:])
            if not read:
                return None
            got += read
    except OSError:
        return None
    return data


def _address(name: bytes) -> str:
    return "\0tandem-ranks-" + name.hex()


def _is_ours(line: socket.socket) -> bool:
    """Whether the process at the other end is this user's."""
    size = _CREDENTIALS.size
    _, uid, _ = _CREDENTIALS.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(uid == os.geteuid())


def close_all(lines: Sequence[socket.socket]) -> None:
    """Close every line."""
    for line in lines:
        line.close()
