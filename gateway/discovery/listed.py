"""Workers that flags name: they never change."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.discovery.source import Addresses, Report
from tandem.service import address as addresses


class ListedWorkers:
    """`--prefill-worker` and `--decode-worker`."""

    def __init__(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        """HOST:PORT each. Raises ConfigError."""
        for text in (*prefill, *decode):
            addresses.parse(text, flag="--prefill-worker/--decode-worker")
        self._addresses = Addresses(tuple(prefill), tuple(decode))

    def start(self, report: Report) -> None:
        """Tells all there is."""
        report.found(self._addresses)

    async def close(self) -> None:
        """Nothing to do."""
