"""A network card between processes, in place of the NIXL wheel.

What a read of blocks asks for arrives when the explorer says so, perhaps long after whoever asked has given up, perhaps
with another byte, or never: its sender is gone.

Generations are read at once, in the step of who asks, which may be held up just before. Agents are objects of this
process and memory is its own, so a read copies from address to address. An agent that was removed and is met again is a
new connection.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from processes import LAYOUT, Decode, Generations, Prefill, Process
from stepping import Recorder, condition, pause

from kv_transfer import nixl, nixl_agent, nixl_source, segments
from kv_transfer.nixl import NixlTarget
from kv_transfer.nixl_agent import NixlAgent, Posted
from tandem.errors import UnavailableError

_TAGS = (b"Agent", b"Conns", b"t", b"c")


@dataclass(eq=False)
class Read:
    """Posted; `state` as NIXL would say it."""

    pairs: list[tuple[int, int, int]]
    """Into, from and bytes."""
    peer: str
    number: int = -1
    state: str = "PROC"
    given_up: bool = False

    def release(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Place:
    """A process's memory: what a read of it, or into it, touches."""

    process: Process
    kind: str
    segment: segments.Segment
    size: int

    def item(self, address: int) -> int | None:
        """Which one lies at an address."""
        at = address - self.segment.address
        return at // self.size if 0 <= at < self.segment.nbytes else None


class Network:
    """Of one world."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.agents: weakref.WeakValueDictionary[str, Agent] = weakref.WeakValueDictionary()
        self.reads: list[Read] = []
        """Of blocks."""
        self._places: list[Place] = []

    def join(self, process: Process) -> None:
        """A new life's memory."""
        blocks = segments.of_buffer(process.runner.buffer)
        self._places.append(Place(process, "memory", blocks, LAYOUT.block_bytes))
        if isinstance(process, Prefill):
            generations = segments.of_buffer(process.memory.generations)
            self._places.append(Place(process, "generation", generations, 8))

    def post(self, read: Read) -> None:
        """Blocks take their time, generations don't."""
        if read.pairs[0][2] == LAYOUT.block_bytes:
            read.number = len(self.reads)
            self.reads.append(read)
        else:
            self.arrive(read)

    def arrive(self, read: Read, flip: int = 0) -> list[tuple[Process, int]]:
        """The bytes, one of which may be another; an error where the sender is gone. Which blocks were written."""
        self._recorder.write("net", read.number)
        read.state = "DONE" if read.peer in self.agents else "ERR"
        written: list[tuple[Process, int]] = []
        for into, source, size in read.pairs if read.state == "DONE" else []:
            for at in range(source, source + size, 8):
                self._touched(at, self._recorder.read)
            written += self._touched(into, self._recorder.write)
            ctypes.memmove(into, source, size)
            ctypes.c_uint8.from_address(into).value ^= flip
        return written

    def _touched(self, address: int, touch: Any) -> list[tuple[Process, int]]:
        found = [(p.process, p.kind, item) for p in self._places if (item := p.item(address)) is not None]
        for process, kind, item in found:
            touch(process.name, kind, item)
        return [(process, item) for process, _, item in found]

    def waiting(self) -> Iterator[Read]:
        """What could arrive."""
        return (read for read in self.reads if read.state == "PROC")


network: Network = None  # type: ignore[assignment]
"""Of whichever world runs."""


class Agent:
    """What `nixl_agent` calls of NIXL's Python API."""

    def __init__(self, name: str, config: Any) -> None:
        self.name, self.backends, self.peers = name, ["UCX"], set[str]()
        network.agents[name] = self

    def register_memory(self, rows: Any, kind: str) -> Any:
        return rows

    def deregister_memory(self, rows: Any) -> None:
        """Nothing is held."""

    def get_agent_metadata(self) -> bytes:
        name = self.name.encode()
        values = (name, (1).to_bytes(8, "little"), b"UCX", b"@" + name)
        fields = (tag + len(v).to_bytes(8, "little") + v + b"|" for tag, v in zip(_TAGS, values, strict=True))
        return b"nixlSerDes|" + b"".join(fields) + name

    def add_remote_agent(self, metadata: bytes) -> bytes:
        name = metadata.rpartition(b"|")[2]
        self.peers.add(name.decode())
        return name

    def check_remote_metadata(self, name: str) -> bool:
        return name in self.peers

    def remove_remote_agent(self, name: str) -> None:
        self.peers.remove(name)

    def prep_xfer_dlist(self, owner: str, rows: Any, kind: str) -> Any:
        return SimpleNamespace(owner=owner, rows=rows[:, :2].astype(np.int64).tolist(), release=lambda: None)

    def make_prepped_xfer(self, _: str, local: Any, mine: Any, remote: Any, theirs: Any) -> Read:
        pairs = [(local.rows[i][0], *remote.rows[j]) for i, j in zip(mine.tolist(), theirs.tolist(), strict=True)]
        return Read(pairs, remote.owner)

    def transfer(self, read: Read) -> str:
        network.post(read)
        return read.state

    def check_xfer_state(self, read: Read) -> str:
        return read.state

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        return {}


class Idle:
    """In place of threads that look after what the explorer makes happen."""

    def __init__(self, **_: Any) -> None:
        """Runs nothing."""

    def start(self) -> None:
        """Never does."""

    def join(self) -> None:
        """Never did."""


def install(patch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    """NIXL is this, until the patch is undone."""
    wheel = SimpleNamespace(nixl_agent=Agent, nixl_agent_config=lambda *_, **__: None)
    patch.setattr(nixl_agent, "installed", lambda: True)
    patch.setattr(nixl_agent, "load", lambda: wheel)
    patch.setattr(nixl, "threading", SimpleNamespace(Condition=condition(recorder), Thread=Idle))
    patch.setattr(nixl_source, "threading", SimpleNamespace(Lock=threading.Lock, Event=threading.Event, Thread=Idle))
    of_buffer = segments.of_buffer
    patch.setattr(segments, "of_buffer", lambda b: of_buffer(b.values if isinstance(b, Generations) else b))
    _pause_at_reads(patch, recorder)
    _record_peers(patch, recorder)


def _pause_at_reads(patch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    read = NixlAgent.read

    def posted(self: NixlAgent, *arguments: Any) -> Posted:
        pause()
        return read(self, *arguments)

    def wait(self: NixlAgent, posted: Posted, seconds: float) -> None:
        one: Read = posted.transfer
        if one.state == "PROC":
            pause(lambda: one.given_up or one.state != "PROC")
        recorder.read("net", one.number)
        if not self.over(posted):
            raise UnavailableError("the sender hangs", reason="SOURCE_SILENT")
        if posted.state != "DONE":
            raise UnavailableError("the sender is gone", reason="SOURCE_GONE")

    patch.setattr(NixlAgent, "read", posted)
    patch.setattr(NixlAgent, "wait", wait)


def _record_peers(patch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    """Who changes what another job looks at: which peers are met, and lost."""

    def recorded(name: str, concerns: Any) -> None:
        function = getattr(NixlTarget, name)

        def call(self: NixlTarget, *arguments: Any) -> Any:
            if concerns(self, *arguments):
                recorder.write("peers", self._changed.number)  # type: ignore[attr-defined]
            return function(self, *arguments)

        patch.setattr(NixlTarget, name, call)

    recorded("_enter", lambda *_: True)
    recorded("_drop_lost", lambda self, peer: peer.reads.lost)
    recorded("_settle", lambda self: self._lost)


def settle(process: Decode, origin: Hashable) -> None:
    """What the thread that looks after lost peers does."""
    for transport in process.transfers._transports.values():
        if isinstance(transport, NixlTarget):
            with process.loop.thread(origin):
                transport._settle()
