"""What each pool scales on, as the chart has it, and what a HorizontalPodAutoscaler makes of it.

The queries are the chart's own (`helm/tandem/files/queries.yaml`), read from there and evaluated as they are. `Scaler`
does what the HPA controller does at each look: a wish for each metric (nothing within the tolerance), the largest of
them, the window before shrinking, and the policies of so many pods a period.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.autoscale.promql import compile_query
from bench.autoscale.scrapes import Scrapes
from tandem.errors import ConfigError

CHART = Path(__file__).resolve().parents[2] / "helm" / "tandem"
NAMESPACE, RELEASE = "models", "demo"
ROLES = ("prefill", "decode")
TOLERANCE = 0.1


@dataclass(frozen=True)
class Rule:
    """One metric of a pool. `kind` is AverageValue when the workers share its value, and Value when the pool grows by
    its ratio to the target.
    """

    name: str
    query: str
    target: float
    kind: str

    def compiled(self) -> Callable[[Scrapes], float]:
        """Its value; NaN when there is none, and then it has no wish."""
        return compile_query(self.query)

    def wish(self, value: float, workers: int) -> int:
        """Workers that it wants, with `workers` there now."""
        shared = self.target * workers if self.kind == "AverageValue" else self.target
        if math.isnan(value) or (workers and abs(value / shared - 1) <= TOLERANCE):
            return workers
        if self.kind == "AverageValue":
            return math.ceil(value / self.target)
        return math.ceil(workers * value / self.target)


@dataclass(frozen=True)
class Pace:
    """How fast a pool may change; seconds."""

    up: float
    down: float
    window: float
    least: int = 1
    most: int = 8


def load_rules(chart: Path = CHART, *, namespace: str = NAMESPACE, release: str = RELEASE) -> dict[str, list[Rule]]:
    """The chart's rules by role, filled in as the chart does. Raises ConfigError."""
    found, scaling = _read(chart / "files" / "queries.yaml"), _read(chart / "values.yaml")["scaling"]
    return {role: [_rule(item, scaling[role], namespace, release) for item in found[role]] for role in ROLES}


def _rule(item: Mapping[str, str], scaling: Mapping[str, float], namespace: str, release: str) -> Rule:
    target = scaling[item["target"]]
    query = item["query"].replace("NAMESPACE", namespace).replace("RELEASE", release).replace("TARGET", str(target))
    return Rule(item["name"], query, float(target), item["type"])


def load_pace(chart: Path = CHART, *, least: int = 1, most: int = 8) -> Pace:
    """The chart's own. Raises ConfigError."""
    scaling = _read(chart / "values.yaml")["scaling"]
    return Pace(scaling["upSeconds"], scaling["downSeconds"], scaling["stabilizationSeconds"], least, most)


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as exc:
        raise ConfigError(f"the chart's {path.name} can't be read: {exc}") from exc


class Scaler:
    """The controller of one pool."""

    def __init__(self, rules: Sequence[Rule], pace: Pace) -> None:
        """Knows no past yet."""
        self._rules = [(rule, rule.compiled()) for rule in rules]
        self._pace = pace
        self._wishes: deque[tuple[float, int]] = deque()
        self._changes: deque[tuple[float, int]] = deque()
        self.values: Mapping[str, float] = {}
        """What each rule said at the last look."""
        self.reason = ""
        """The rule with the largest wish then."""

    def look(self, now: float, scrapes: Scrapes, workers: int) -> int:
        """How many workers the pool is to have, with `workers` ordered now."""
        self.values = {rule.name: value(scrapes) for rule, value in self._rules}
        wishes = {rule.name: rule.wish(self.values[rule.name], workers) for rule, _ in self._rules}
        self.reason = max(wishes, key=lambda name: wishes[name])
        wanted = self._steady(now, wishes[self.reason], workers)
        wanted = min(self._pace.most, max(self._pace.least, self._limited(now, wanted, workers)))
        if wanted != workers:
            self._changes.append((now, wanted - workers))
        return wanted

    def _steady(self, now: float, wish: int, workers: int) -> int:
        """Shrinks only to the largest wish of the window."""
        self._wishes.append((now, wish))
        while self._wishes[0][0] < now - self._pace.window:
            self._wishes.popleft()
        return wish if wish >= workers else min(workers, max(wish for _, wish in self._wishes))

    def _limited(self, now: float, wanted: int, workers: int) -> int:
        """One pod a period, up and down."""
        while self._changes and self._changes[0][0] <= now - max(self._pace.up, self._pace.down):
            self._changes.popleft()
        added = sum(max(0, change) for at, change in self._changes if at > now - self._pace.up)
        removed = sum(max(0, -change) for at, change in self._changes if at > now - self._pace.down)
        if wanted > workers:
            return max(workers, min(wanted, workers - added + 1))
        return min(workers, max(wanted, workers + removed - 1))
