"""Which of a worker's ranks this process is, as torchrun says it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tandem.errors import ConfigError

MOST_RANKS: Final = 64
_MOST_PORT: Final = 65535


@dataclass(frozen=True, slots=True)
class World:
    """One process of `size`; they meet at `address` and `port`, where torch's store listens."""

    rank: int
    size: int
    local_rank: int
    """Which of the machine's GPUs is this process's."""
    address: str
    port: int

    @property
    def leads(self) -> bool:
        """True for rank 0, which has the scheduler and whatever else there is one of."""
        return self.rank == 0


def world_from(environ: Mapping[str, str]) -> World | None:
    """What RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say; None for a process alone.

    Raises ConfigError, naming the variable.
    """
    size = _number(environ, "WORLD_SIZE", 1, MOST_RANKS, "1")
    if size == 1:
        return None
    rank = _number(environ, "RANK", 0, size - 1)
    if _number(environ, "LOCAL_WORLD_SIZE", 1, MOST_RANKS, str(size)) != size:
        raise ConfigError(f"LOCAL_WORLD_SIZE: all {size} ranks of a worker must run on one machine")
    address = environ.get("MASTER_ADDR", "")
    if not address:
        raise ConfigError("MASTER_ADDR: is needed with WORLD_SIZE over 1; 127.0.0.1 will do, or start with torchrun")
    local_rank = _number(environ, "LOCAL_RANK", 0, size - 1, str(rank))
    return World(rank, size, local_rank, address, _number(environ, "MASTER_PORT", 1, _MOST_PORT))


def _number(environ: Mapping[str, str], name: str, low: int, high: int, default: str = "") -> int:
    text = environ.get(name, "") or default
    if not text.isdecimal() or not low <= int(text) <= high:
        raise ConfigError(f"{name}: {text!r} is not a number from {low} to {high}")
    return int(text)
