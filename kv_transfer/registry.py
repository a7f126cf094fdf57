"""The transports by name, and which one two workers use. A new transport is one line in each table."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kv_transfer import nixl_agent
from kv_transfer.grpc import GrpcSource, GrpcTarget
from kv_transfer.memory import MemorySource, MemoryTarget
from kv_transfer.nixl import NixlTarget
from kv_transfer.nixl_endpoint import metadata_head
from kv_transfer.nixl_source import NixlSource
from kv_transfer.pool import PoolMemory
from kv_transfer.shm import ShmSource, ShmTarget
from kv_transfer.transport import SourceTransport, TargetTransport
from tandem.errors import ConfigError, IncompatibleError, InvalidRequestError

_SOURCES: dict[str, Callable[[PoolMemory, str], SourceTransport]] = {
    "memory": MemorySource,
    "shm": ShmSource,
    "nixl": NixlSource,
    "grpc": GrpcSource,
}
_TARGETS: dict[str, Callable[[], TargetTransport]] = {
    "memory": MemoryTarget,
    "shm": ShmTarget,
    "nixl": NixlTarget,
    "grpc": GrpcTarget,
}


IN_CLEAR = frozenset({NixlSource.name})
"""Transports that send KV over a network without encryption, whatever certificates there are."""


def available() -> list[str]:
    """Transports between processes that this machine can use, best first."""
    shared = sys.platform == "linux" and hasattr(socket, "SO_PEERCRED")
    return [*(["shm"] if shared else []), *(["nixl"] if nixl_agent.installed() else []), "grpc"]


def require(name: str) -> None:
    """Raise ConfigError, with what to do, unless this machine can use the transport `name` now: for who asked for it.

    With nixl it starts an agent and ends it.
    """
    if name == NixlSource.name:
        _check_nixl()
    if name not in (here := available()):
        raise ConfigError(f"transport {name!r} is not available here; available are {', '.join(here)}")


def _check_nixl() -> None:
    agent = nixl_agent.NixlAgent("check")
    try:
        metadata_head(agent.metadata())
    except InvalidRequestError as error:
        raise ConfigError(
            f"transport nixl doesn't know the agents of this NIXL wheel; it knows those of 1.5: {nixl_agent.INSTALL}"
        ) from error
    finally:
        agent.close()


def source_transport(name: str, pool: PoolMemory, incarnation: str) -> SourceTransport:
    """The sender's end over `pool`; ConfigError for an unknown name or an unfit pool."""
    if name not in _SOURCES:
        raise ConfigError(f"unknown transport {name!r}; known are {', '.join(_SOURCES)}")
    return _SOURCES[name](pool, incarnation)


def target_transport(name: str) -> TargetTransport:
    """The receiver's end; ConfigError for an unknown name."""
    if name not in _TARGETS:
        raise ConfigError(f"unknown transport {name!r}; known are {', '.join(_TARGETS)}")
    return _TARGETS[name]()


def host_id() -> str:
    """Equal for processes that can share memory: of one boot of one machine, network namespace and user.

    Empty where the system doesn't say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/net").st_ino
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {namespace} {os.geteuid()}".encode()).hexdigest()[:32]


def choose(source_names: Sequence[str], target_names: Sequence[str], *, one_host: bool = True) -> str:
    """The first of the sender's transports that the receiver has too; both lists are best first.

    Shared memory is left out unless they are on `one_host`. Raises IncompatibleError, naming both lists, when none is
    common.
    """
    for name in source_names:
        if name in target_names and (one_host or name != ShmSource.name):
            return name
    where = "" if one_host else ", on another host"
    raise IncompatibleError(
        f"no common transport: sender has {list(source_names)}, receiver has {list(target_names)}{where}"
    )
