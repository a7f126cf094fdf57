"""What a Prometheus would have scraped of a simulated cluster: series by name and labels, with their recent samples."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache

Labels = frozenset[tuple[str, str]]
Matcher = tuple[str, str, str]
Sample = tuple[float, float]
KEEP_SECONDS = 600.0


class Scrapes:
    """Life cycle: `scrape` at each interval -> `now` and `rates` as of the last scrape."""

    def __init__(self) -> None:
        """Empty."""
        self.time = 0.0
        self._series: dict[str, dict[Labels, deque[Sample]]] = {}

    def scrape(self, time: float, samples: Mapping[tuple[str, Labels], float]) -> None:
        """Everything there is at `time` (seconds); what was there before and isn't now is stale from here on."""
        self.time = time
        for (name, labels), value in samples.items():
            self._series.setdefault(name, {}).setdefault(labels, deque()).append((time, value))
        for family in self._series.values():
            for labels in list(family):
                points = family[labels]
                while points and points[0][0] < time - KEEP_SECONDS:
                    points.popleft()
                if not points:
                    del family[labels]

    def now(self, name: str, matchers: Sequence[Matcher]) -> dict[Labels, float]:
        """An instant vector."""
        return {
            labels: points[-1][1]
            for labels, points in self._series.get(name, {}).items()
            if points[-1][0] == self.time and matches(labels, tuple(matchers))
        }

    def rates(self, name: str, matchers: Sequence[Matcher], seconds: float) -> dict[Labels, float]:
        """`rate()` of counters over the last `seconds`; series that went stale within them count too."""
        found = {}
        for labels, points in self._series.get(name, {}).items():
            if not matches(labels, tuple(matchers)):
                continue
            recent = [point for point in points if point[0] > self.time - seconds]
            if len(recent) >= 2:
                found[labels] = extrapolated_rate(recent, self.time - seconds, self.time)
        return found


def extrapolated_rate(points: Sequence[Sample], start: float, end: float) -> float:
    """Increase a second over (start, end], as Prometheus extrapolates it: to the bounds where samples come close to
    them, else by half an interval, and never to below zero.
    """
    increase, last = points[-1][1] - points[0][1], points[0][1]
    for _, value in points:
        if value < last:
            increase += last  # a counter that began anew
        last = value
    span = points[-1][0] - points[0][0]
    interval = span / (len(points) - 1)
    before, after = points[0][0] - start, end - points[-1][0]
    if before >= interval * 1.1:
        before = interval / 2
    if increase > 0 and points[0][1] >= 0:
        before = min(before, span * points[0][1] / increase)
    if after >= interval * 1.1:
        after = interval / 2
    return increase * (span + before + after) / span / (end - start)


@lru_cache(maxsize=65536)
def matches(labels: Labels, matchers: tuple[Matcher, ...]) -> bool:
    """All of `(label, sign, text)` hold; a label that isn't there is empty."""
    given = dict(labels)
    for label, sign, text in matchers:
        value = given.get(label, "")
        found = value == text if sign in ("=", "!=") else re.fullmatch(text, value) is not None
        if found != (sign in ("=", "=~")):
            return False
    return True
