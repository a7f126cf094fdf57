"""Finds stop strings in text that comes in pieces.

Life cycle: one `StopMatcher` per output; `push` text in order until it reports a match, else `flush` once at the end.
Text that may yet become a stop string is held back. The match that is complete first wins, and among those the
longest: so the result doesn't depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopResult:
    """`text` may be given out; `match` is the stop string that was found."""

    text: str
    match: str | None = None


class StopMatcher:
    """Holds back at most the longest stop string less one character."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include` leaves the match at the end of the text."""
        self._stops, self._include = tuple(stops), include
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> StopResult:
        """Adds text; after a match nothing more may be pushed."""
        if not self._stops or not text:
            return StopResult(text)
        buffer = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if found:
            end, start, stop = min(found)
            self._held = ""
            return StopResult(buffer[: end if self._include else start], stop)
        keep = self._held_length(buffer)
        self._held = buffer[len(buffer) - keep :]
        return StopResult(buffer[: len(buffer) - keep])

    def flush(self) -> str:
        """The text still held back: it became no stop string."""
        text, self._held = self._held, ""
        return text

    def _held_length(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that begins a stop string."""
        for length in range(min(self._longest - 1, len(buffer)), 0, -1):
            tail = buffer[len(buffer) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
