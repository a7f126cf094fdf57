"""Run by a test in a network of its own: a name server on port 53, and a source that asks it. Prints what was found."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct

from gateway.discovery.dns import DnsWorkers, Pace
from gateway.discovery.source import Addresses
from tandem.service.address import Address


class NameServer(asyncio.DatagramProtocol):
    """Answers questions for A records of any name with `hosts`, and says that there are no others."""

    hosts: tuple[str, ...] = ("10.0.0.2", "10.0.0.1")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, peer: tuple[str, int]) -> None:
        end = data.index(b"\0", 12) + 5
        asks_for_a = data[end - 4 : end - 2] == b"\0\1"
        records = [b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + socket.inet_aton(host) for host in self.hosts if asks_for_a]
        head = data[:2] + struct.pack("!HHHHH", 0x8580, 1, len(records), 0, 0)
        self._transport.sendto(head + data[12:end] + b"".join(records), peer)


class Printer:
    """Prints each report."""

    def __init__(self) -> None:
        self.reports: asyncio.Queue[Addresses] = asyncio.Queue()

    def found(self, addresses: Addresses) -> None:
        print(",".join(addresses.decode), flush=True)
        self.reports.put_nowait(addresses)

    def trouble(self, reason: str) -> None:
        raise AssertionError(reason)


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, 0x8914, struct.pack("16sH22x", b"lo", 0x1))  # SIOCSIFFLAGS, IFF_UP


async def _main() -> None:
    _loopback_up()
    transport, server = await asyncio.get_running_loop().create_datagram_endpoint(
        NameServer, local_addr=("127.0.0.1", 53)
    )
    printer, source = Printer(), DnsWorkers({"decode": Address("tandem-decode.test", 7001)}, Pace(interval=0.1))
    source.start(printer)
    await printer.reports.get()
    server.hosts = ("10.0.0.3",)
    await printer.reports.get()
    await source.close()
    transport.close()


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(_main(), 30))
