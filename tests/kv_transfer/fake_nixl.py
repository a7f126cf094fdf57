"""The part of the NIXL wheel's Python API that Tandem calls, between agents of this process: same calls, same answers.

A read copies memory by its addresses, after `nixl_agent.polls` looks at it; of a peer in `hung` not before it is out.
"""

from __future__ import annotations

import ctypes
import json
import struct
import weakref
from typing import Any, ClassVar

import numpy as np

# ruff: noqa: N801
Ranges = list[tuple[int, int]]
nixlMismatchError, nixlBackendError, nixlRemoteDisconnectError = (  # noqa: N816
    type(name, (Exception,), {}) for name in ("nixlMismatchError", "nixlBackendError", "nixlRemoteDisconnectError")
)


class nixl_agent_config:
    def __init__(self, enable_prog_thread: bool = True, *, backends: list[str]) -> None:
        assert not enable_prog_thread, "an idle agent's progress thread takes a whole core"
        self.backends = backends


class Handle:
    def __init__(self, **what: Any) -> None:
        self.__dict__.update(what, released=False)

    def release(self) -> None:
        self.released = True


def metadata(name: str, ranges: Ranges, address: bytes = b"") -> bytes:
    fields = (
        (b"Agent", name.encode()),
        (b"Conns", struct.pack("<Q", 1)),
        (b"t", b"UCX"),
        (b"c", address or b"@" + name.encode()),
    )
    head = b"".join(tag + struct.pack("<Q", len(value)) + value + b"|" for tag, value in fields)
    return b"nixlSerDes|" + head + json.dumps([name, ranges]).encode()


class nixl_agent:
    polls: ClassVar[int] = 0
    hung: ClassVar[set[str]] = set()
    alive: ClassVar[weakref.WeakValueDictionary[str, nixl_agent]] = weakref.WeakValueDictionary()

    def __init__(self, agent_name: str, nixl_conf: nixl_agent_config) -> None:
        self.name, self.backends = agent_name, dict.fromkeys(nixl_conf.backends, 1)
        self.ranges: Ranges = []
        self.peers: dict[str, Ranges] = {}
        self.alive[agent_name] = self

    def register_memory(self, reg_list: list[tuple[int, int, int, str]], mem_type: str) -> Handle:
        assert mem_type == "DRAM"
        added = [(address, size) for address, size, _, _ in reg_list]
        self.ranges += added
        return Handle(ranges=added)

    def deregister_memory(self, dereg_list: Handle) -> None:
        for each in dereg_list.ranges:
            self.ranges.remove(each)

    def get_agent_metadata(self) -> bytes:
        return metadata(self.name, self.ranges)

    def add_remote_agent(self, metadata: bytes) -> bytes:
        if not metadata.startswith(b"nixlSerDes|") or b"|[" not in metadata:
            raise nixlMismatchError("NIXL_ERR_MISMATCH")
        name, ranges = json.loads(metadata[metadata.rindex(b"|[") + 1 :])
        if name not in self.alive:
            raise nixlBackendError("NIXL_ERR_BACKEND")
        self.peers[name] = [(address, size) for address, size in ranges]
        return str(name).encode()

    def check_remote_metadata(self, agent: str) -> bool:
        return agent in self.peers and agent in self.alive

    def remove_remote_agent(self, agent: str) -> None:
        del self.peers[agent]

    def prep_xfer_dlist(self, agent_name: str, xfer_list: np.ndarray[Any, Any], mem_type: str) -> Handle:
        assert (xfer_list.dtype, mem_type) == (np.uint64, "DRAM")
        ranges, rows = self.peers.get(agent_name, self.ranges), xfer_list[:, :2].tolist()
        if not all(any(at <= row[0] and sum(row) <= at + size for at, size in ranges) for row in rows):
            raise nixlBackendError("NIXL_ERR_NOT_FOUND")
        return Handle(agent=agent_name, rows=rows)

    def make_prepped_xfer(self, operation: str, local: Handle, mine: Any, remote: Handle, theirs: Any) -> Handle:
        assert (operation, mine.dtype, theirs.dtype, local.agent) == ("READ", np.int32, np.int32, "NIXL_INIT_AGENT")
        assert (local.released, remote.released) == (False, False)
        pairs = [(local.rows[i], remote.rows[j]) for i, j in zip(mine.tolist(), theirs.tolist(), strict=True)]
        return Handle(pairs=pairs, peer=remote.agent, left=self.polls)

    def transfer(self, handle: Handle) -> str:
        if handle.peer not in self.alive:
            self.peers.pop(handle.peer, None)
            raise nixlRemoteDisconnectError("NIXL_ERR_REMOTE_DISCONNECT")
        return self.check_xfer_state(handle)

    def check_xfer_state(self, handle: Handle) -> str:
        assert not handle.released
        if handle.peer not in self.peers:
            raise nixlBackendError("NIXL_ERR_NOT_FOUND")  # whatever the network card still does
        if handle.peer in self.hung:
            return "PROC"
        handle.left -= 1
        if handle.left >= 0:
            return "PROC"
        for (into, size), (source, _) in handle.pairs:
            ctypes.memmove(into, source, size)
        return "DONE"

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        return {}
