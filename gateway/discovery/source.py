"""Where the gateway's workers come from: one small interface, one file beside this for each kind of source.

Life cycle of a `Source`: made from flags (ConfigError for what can't work) -> `start(report)` inside the event loop:
`report.found` is called at once with what is known already, and after each change -> `close()`.

A source says where workers are. Whether they live they say themselves (`gateway.workers`), so a source in trouble keeps
what it knew last, and says so by `report.trouble`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Role = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Addresses:
    """HOST:PORT of the workers of each role."""

    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()


class Report(Protocol):
    """Who is told. Both are for the event loop and never raise."""

    def found(self, addresses: Addresses) -> None:
        """The workers are exactly these."""
        ...

    def trouble(self, reason: str) -> None:
        """A lookup failed; what was found last stays."""
        ...


class Source(Protocol):
    """See the module's life cycle."""

    def start(self, report: Report) -> None:
        """Raises ConfigError."""
        ...

    async def close(self) -> None:
        """Looks no more."""
        ...
