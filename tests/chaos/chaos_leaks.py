"""What a quiet stack holds: blocks, descriptors, shared memory, threads, processes, memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import urllib.request
from dataclasses import dataclass
from typing import Any

import psutil
from chaos_stack import Place, Stack
from prometheus_client.parser import text_string_to_metric_families

from tandem.service.channel import open_channel
from tandem.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2

SETTLE_SECONDS = 30.0
MOST_GROWTH = 1.25
MOST_MORE_DESCRIPTORS = 24
MOST_MORE_THREADS = 16
"""Over what the process had at its first quiet moment: connections come and go, gRPC's threads grow to a bound."""


@dataclass(frozen=True)
class Holding:
    """What one process has."""

    start: int
    descriptors: int
    memfds: int
    threads: int
    children: int
    rss: int


def holding(pid: int, start: int = 0) -> Holding:
    """Now. `start` tells the lives of one place apart."""
    process = psutil.Process(pid)
    links = []
    for entry in os.scandir(f"/proc/{process.pid}/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(entry.path))
    memfds = sum(link.startswith("/memfd:") for link in links)
    rss = process.memory_info().rss
    return Holding(start, len(links), memfds, process.num_threads(), len(process.children()), rss)


async def load_of(place: Place) -> types_pb2.WorkerLoad:
    """What a worker says itself, asked without a proxy between."""
    assert place.said is not None
    async with open_channel(place.said.address) as channel:
        if place.role == "prefill":
            stub: Any = prefill_pb2_grpc.PrefillServiceStub(channel)
            call = stub.WatchPrefillLoad(prefill_pb2.WatchPrefillLoadRequest(), timeout=10)
        else:
            stub = decode_pb2_grpc.DecodeServiceStub(channel)
            call = stub.WatchDecodeLoad(decode_pb2.WatchDecodeLoadRequest(), timeout=10)
        response = await call.read()
        call.cancel()
        return response.load  # type: ignore[no-any-return]


def busy(load: types_pb2.WorkerLoad) -> str:
    """What it still holds; empty when nothing."""
    held = {
        "blocks": load.total_blocks - load.free_blocks,
        "running": load.running_sequences,
        "waiting": load.waiting_requests,
        "receiving": load.receiving_requests,
        "prefill tokens": load.queued_prefill_tokens,
    }
    return ", ".join(f"{count} {name}" for name, count in held.items() if count)


def _integrity_failures(place: Place) -> float:
    assert place.said is not None
    with urllib.request.urlopen(f"http://{place.said.metrics}/metrics", timeout=10) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == "tandem_integrity_failures_total")


class Leaks:
    """Compares quiet moments. Each is worth as much as the life of the processes that it finds."""

    def __init__(self, stack: Stack) -> None:
        """Nothing seen."""
        self._stack = stack
        self._first: dict[tuple[str, int], Holding] = {}
        self.rss: list[int] = []
        """Bytes of all processes, at each quiet moment."""
        self.problems: list[str] = []

    async def look(self) -> None:
        """At a quiet moment: no stream runs, all processes are up."""
        for place in self._stack.workers:
            await self._settled(place)
            if failures := await asyncio.to_thread(_integrity_failures, place):
                self.problems.append(f"{place.name}: {failures:g} integrity failures")
        now = {p.name: holding(p.process.pid, p.starts) for p in self._stack.places if p.process is not None}
        self.rss.append(sum(each.rss for each in now.values()))
        clients = holding(os.getpid())
        self._compare("the clients", clients, self._first.setdefault(("the clients", 0), clients), ours=True)
        for name, each in now.items():
            self._compare(name, each, self._first.setdefault((name, each.start), each))
        self._check_trend()

    def _check_trend(self) -> None:
        """Processes come and go, so that only the whole is worth a look, over a while."""
        third = len(self.rss) // 3
        if third >= 2:
            first, last = statistics.median(self.rss[:third]), statistics.median(self.rss[-third:])
            if last > MOST_GROWTH * first:
                self.problems.append(f"memory grows: {[rss >> 20 for rss in self.rss]} MiB")

    async def _settled(self, place: Place) -> None:
        still = ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                while still := busy(await load_of(place)):  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        if still:
            self.problems.append(f"{place.name} still holds {still}, {SETTLE_SECONDS:g} s after the last stream")

    def _compare(self, name: str, now: Holding, first: Holding, *, ours: bool = False) -> None:
        # Our first moment is before the clients, and every link's proxy is ours.
        more = MOST_MORE_DESCRIPTORS * (8 if ours else 1)
        if now.descriptors > first.descriptors + more:
            self.problems.append(f"{name}: {now.descriptors} descriptors, at first {first.descriptors}")
        if now.threads > first.threads + MOST_MORE_THREADS:
            self.problems.append(f"{name}: {now.threads} threads, at first {first.threads}")
        if now.children and not ours:
            self.problems.append(f"{name}: {now.children} processes of its own")
        most = 2 + len(self._stack.of("prefill"))  # its own pool, and the pools that a decode worker reads
        if now.memfds > most:
            self.problems.append(f"{name}: {now.memfds} memfds, at most {most} have a use")
