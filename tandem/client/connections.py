"""One client's connections to its gateways: each is opened anew when the client's certificate was renewed.

Life of a connection: opened with the certificate of that moment -> `borrow` around each call -> outdated, when the
files have changed: the next call has a new one, running calls go on -> closed with its last user, or with the client.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tandem.service.tls import ChannelTls, ClientTls
from tandem.v1 import inference_pb2_grpc

Channel = TypeVar("Channel")
Open = Callable[[str, ChannelTls | None], Channel]


@dataclass(eq=False)
class Connection(Generic[Channel]):
    """A channel, and what is called through it. Its users belong to the lock of `Connections`."""

    channel: Channel
    stub: Any
    version: int
    users: int = 0


class Connections(Generic[Channel]):
    """By the gateway's place in the list of addresses. Thread-safe."""

    def __init__(self, addresses: Sequence[str], open_channel: Open[Channel], tls: ClientTls | None) -> None:
        """Opens them; gRPC connects lazily."""
        self._addresses, self._open_channel, self._tls = tuple(addresses), open_channel, tls
        self._lock = threading.Lock()
        self._now = [self._open(address) for address in self._addresses]
        self._outdated: list[Connection[Channel]] = []

    def _open(self, address: str) -> Connection[Channel]:
        tls, version = (None, 0) if self._tls is None else self._tls.current()
        channel: Any = self._open_channel(address, tls)
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        return Connection(channel, stub, version)

    def borrow(self, at: int) -> Connection[Channel]:
        """For one call, until `give_back`."""
        with self._lock:
            connection = self._now[at]
            if self._tls is not None and self._tls.version != connection.version:
                self._outdated.append(connection)
                connection = self._now[at] = self._open(self._addresses[at])
            connection.users += 1
            return connection

    def give_back(self, connection: Connection[Channel]) -> list[Channel]:
        """The channels that nobody uses any more: the caller closes them."""
        with self._lock:
            connection.users -= 1
            unused = [one for one in self._outdated if not one.users]
            self._outdated = [one for one in self._outdated if one.users]
            return [one.channel for one in unused]

    def all(self) -> list[Channel]:
        """Every channel that is open, to close them."""
        with self._lock:
            return [one.channel for one in (*self._now, *self._outdated)]
