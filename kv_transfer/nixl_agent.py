"""One NIXL agent of this process, shared by threads: the only file that calls NIXL. Every call is under one lock.

Life: made -> `register` memory -> `metadata` (a source), or `add_peer`, `prepare`, `read` and `wait` (a target) ->
`close`.

The agent has no thread: NIXL's own progress thread polls without a pause, a whole core for each idle agent. So whoever
has a read under way polls it (`wait`), from a thread that may block, and a source must call `progress` now and then.
Posting and polling release the interpreter's lock; on one machine the bytes are copied while a read is posted.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kv_transfer.segments import Segment
from tandem.errors import ConfigError, InvalidRequestError, UnavailableError

PACKAGES = ("nixl_cu12", "nixl_cu13")
INSTALL = "python -m pip install --no-deps nixl-cu12"
BACKEND = "UCX"
LOCAL = "NIXL_INIT_AGENT"
_QUIET = {"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "fatal"}
"""Both libraries write to stdout and stderr, which belong to the worker; what goes wrong comes as an error, too."""
_FIRST_PAUSE, _LONGEST_PAUSE = 20e-6, 1e-3
"""Seconds between two looks at a read; doubled from one to the other."""


@dataclass(slots=True)
class Posted:
    """A read that was posted. `state` as NIXL last said it."""

    transfer: Any
    state: str


def installed() -> bool:
    """Whether a NIXL wheel is there; imports nothing."""
    return any(importlib.util.find_spec(package) is not None for package in PACKAGES)


def require_installed() -> None:
    """ConfigError, with what to do, unless a wheel is there."""
    if not installed():
        raise ConfigError(f"transport nixl needs the NIXL wheel, which is not installed here: {INSTALL}")


def load() -> Any:
    """The wheel's Python API. ConfigError when none is installed or it can't be loaded."""
    require_installed()
    return _load(next(package for package in PACKAGES if importlib.util.find_spec(package) is not None))


def _load(package: str) -> Any:
    for name, level in _QUIET.items():
        os.environ.setdefault(name, level)
    raising = logging.raiseExceptions
    try:
        return importlib.import_module(f"{package}._api")
    except (ImportError, OSError) as error:
        raise ConfigError(f"transport nixl can't load {package}: {error}") from error
    finally:
        logging.raiseExceptions = raising  # the wheel turns it off for the whole process


class NixlAgent:
    """An agent with its UCX backend. Thread-safe."""

    def __init__(self, name: str) -> None:
        """`name` is what peers know it by. Raises ConfigError when NIXL is missing or can't start."""
        api = load()
        self._lock = threading.Lock()
        self._held: list[object] = []
        try:
            self._agent: Any = api.nixl_agent(name, api.nixl_agent_config(False, backends=[BACKEND]))
        except Exception as error:
            raise ConfigError(f"transport nixl can't start an agent: {error}") from error
        if BACKEND not in self._agent.backends:
            raise ConfigError(f"transport nixl needs the plugin {BACKEND}, which this NIXL wheel lacks")

    def register(self, segment: Segment, owner: object) -> Any:
        """Let the network card, or whoever copies, reach a segment; `owner` is held until `close`."""
        with self._lock:
            rows = [(segment.address, segment.nbytes, segment.device, "")]
            registered = self._alive().register_memory(rows, segment.kind)
            self._held.append(owner)
            return registered

    def deregister(self, registered: Any, owner: object) -> None:
        """Undo `register`, once no read of it is under way."""
        with self._lock:
            self._alive().deregister_memory(registered)
            self._held = [held for held in self._held if held is not owner]

    def metadata(self) -> bytes:
        """What a peer needs to reach this agent and the memory registered so far."""
        with self._lock:
            return bytes(self._alive().get_agent_metadata())

    def add_peer(self, metadata: bytes) -> str:
        """Take a peer's metadata; its name. Raises InvalidRequestError (malformed), UnavailableError (not there)."""
        with self._lock:
            agent = self._alive()
            try:
                name = agent.add_remote_agent(metadata)
            except Exception as error:
                if type(error).__name__ in ("nixlMismatchError", "nixlInvalidParamError"):
                    raise InvalidRequestError("malformed endpoint for transport nixl", field="open.endpoint") from error
                raise _gone(error) from error
            return name.decode() if isinstance(name, bytes) else str(name)

    def remove_peer(self, name: str) -> None:
        """Forget a peer and end the connection, once no read from it is under way. One that is lost already is fine."""
        with self._lock:
            agent = self._alive()
            if agent.check_remote_metadata(name):
                agent.remove_remote_agent(name)

    def knows(self, name: str) -> bool:
        """False once the connection to a peer is lost."""
        with self._lock:
            return bool(self._alive().check_remote_metadata(name))

    def prepare(self, owner: str, segment: Segment, piece_bytes: int) -> Any:
        """Descriptors of a segment cut into pieces, of `LOCAL` or of a peer: `read` takes their numbers."""
        return self.prepare_pieces(owner, segment, range(0, segment.nbytes, piece_bytes), piece_bytes)

    def prepare_pieces(self, owner: str, segment: Segment, starts: Sequence[int], piece_bytes: int) -> Any:
        """`prepare` for pieces of equal size that begin at `starts`, in bytes from the segment's own start."""
        rows = np.empty((len(starts), 3), dtype=np.uint64)
        rows[:, 0] = np.uint64(segment.address) + np.fromiter(starts, dtype=np.uint64, count=len(starts))
        rows[:, 1] = piece_bytes
        rows[:, 2] = segment.device
        with self._lock:
            try:
                return self._alive().prep_xfer_dlist(owner, rows, segment.kind)
            except Exception as error:
                raise _gone(error) from error

    def release(self, held: Any) -> None:
        """Give descriptors, or a transfer that is over, back. What NIXL can't release yet it keeps to its own end."""
        with self._lock, contextlib.suppress(Exception):
            held.release()

    def read(self, into: Any, into_pieces: Sequence[int], source: Any, source_pieces: Sequence[int]) -> Posted:
        """Post a read of pieces of a peer's memory into pieces of ours; goes to `wait`.

        Raises UnavailableError; some of the pieces may arrive nevertheless.
        """
        numbers = [np.fromiter(pieces, dtype=np.int32) for pieces in (into_pieces, source_pieces)]
        with self._lock:
            agent, transfer = self._alive(), None
            try:
                transfer = agent.make_prepped_xfer("READ", into, numbers[0], source, numbers[1])
                return Posted(transfer, agent.transfer(transfer))
            except Exception as error:
                if transfer is not None:
                    with contextlib.suppress(Exception):
                        transfer.release()
                raise _gone(error) from error

    def wait(self, posted: Posted, seconds: float) -> None:
        """Wait until a read is over, and release it.

        Raises UnavailableError if it failed (SOURCE_GONE) or isn't over after `seconds` (SOURCE_SILENT): it stays as it
        is then. Releasing one that is under way doesn't keep the network card from writing: see `over`.
        """
        pause, end = _FIRST_PAUSE, time.monotonic() + seconds
        while posted.state == "PROC" and time.monotonic() < end:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            self.over(posted)
        if posted.state == "PROC":
            raise UnavailableError(f"a read of the sender's memory takes over {seconds:g} s", reason="SOURCE_SILENT")
        if posted.state != "DONE":
            raise _gone(None)
        self.release(posted.transfer)

    def over(self, posted: Posted) -> bool:
        """Look at a read once: False while it is under way."""
        with self._lock:
            if posted.state == "PROC":
                posted.state = _state_of(self._agent, posted.transfer)
            return posted.state != "PROC"

    def progress(self) -> None:
        """Answer peers that connect, and move what they read where the network can't do that alone."""
        with self._lock:
            try:
                self._alive().get_new_notifs()
            except UnavailableError:
                raise
            except Exception:
                return  # one connection's trouble, of which the peer that reads over it learns

    def close(self) -> None:
        """Forget everything; nothing may be under way. Idempotent."""
        with self._lock:
            self._agent = None
            self._held.clear()

    def _alive(self) -> Any:
        if self._agent is None:
            raise UnavailableError("this worker is closing", reason="CLOSING")
        return self._agent


def start_agent(name: str) -> NixlAgent:
    """A NixlAgent in the middle of serving: raises UnavailableError in place of ConfigError."""
    try:
        return NixlAgent(name)
    except ConfigError as error:
        raise UnavailableError(error.message, reason="NIXL_FAILED") from error


def _state_of(agent: Any, transfer: Any) -> str:
    """ERR, too, when the agent is closed: then nothing is under way."""
    try:
        return str(agent.check_xfer_state(transfer))
    except Exception:
        return "ERR"


def _gone(error: Exception | None) -> UnavailableError:
    """Whatever NIXL says, the blocks can't be had from there."""
    detail = f": {error}" if error is not None else ""
    return UnavailableError(f"the sender's memory can't be read{detail}", reason="SOURCE_GONE")
