"""From measurements to a table: medians over rounds, ratios to the best peer, markdown and JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.peers.processes import Measurement

TANDEM = "tandem"


@dataclass(slots=True)
class System:
    """One row: Tandem or a peer."""

    name: str
    title: str
    version: str = ""
    rates: dict[str, list[float]] = field(default_factory=dict)
    """Tokens a second by point, one per round in which it worked."""
    why: dict[str, str] = field(default_factory=dict)
    """By point: why it has no figure. The key "" stands for all points."""

    def add(self, measurement: Measurement) -> None:
        """Takes in one round's result at one point."""
        if measurement.tokens_per_s is None:
            self.why[measurement.point] = measurement.why
        else:
            self.rates.setdefault(measurement.point, []).append(measurement.tokens_per_s)

    def median(self, point: str) -> float | None:
        """The median over rounds, or None without any figure."""
        rates = self.rates.get(point)
        return statistics.median(rates) if rates else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that a table says."""

    facts: Mapping[str, str]
    """Machine, date, command and so on: label to text, in order."""
    points: Sequence[str]
    systems: Sequence[System]

    def best_peer(self, point: str) -> System | None:
        """The peer with the highest median at `point`."""
        peers = [system for system in self.systems if system.name != TANDEM and system.median(point) is not None]
        return max(peers, key=lambda system: system.median(point) or 0.0, default=None)

    def ratio(self, point: str) -> float | None:
        """Tandem's median over the best peer's; None when either has none."""
        tandem = next((system for system in self.systems if system.name == TANDEM), None)
        ours = tandem.median(point) if tandem else None
        best = self.best_peer(point)
        theirs = best.median(point) if best else None
        return ours / theirs if ours is not None and theirs else None


def markdown(comparison: Comparison) -> str:
    """The table for people."""
    points = comparison.points
    lines = ["# Tandem and its peers", ""]
    lines += [f"- {label}: {text}" for label, text in comparison.facts.items()]
    lines += ["", "Tokens a second; medians over the rounds.", ""]
    lines += [_row(["", *points]), _row(["---", *["---:"] * len(points)])]
    for system in comparison.systems:
        name = f"{system.title} {system.version}".strip()
        lines.append(_row([name, *(_number(system.median(point)) for point in points)]))
    best = [comparison.best_peer(point) for point in points]
    lines.append(_row(["best peer", *(system.name if system else "-" for system in best)]))
    lines.append(_row(["**Tandem / best peer**", *(_ratio(comparison.ratio(point)) for point in points)]))
    return "\n".join([*lines, *_notes(comparison), ""])


def as_json(comparison: Comparison) -> str:
    """The same for programs, with every round's figure."""
    systems = [
        {
            "name": system.name,
            "version": system.version,
            "tokens_per_s": {point: system.median(point) for point in comparison.points},
            "rounds": system.rates,
            "why_not": system.why,
        }
        for system in comparison.systems
    ]
    best = {point: system.name for point in comparison.points if (system := comparison.best_peer(point))}
    ratios = {point: round(ratio, 3) for point in comparison.points if (ratio := comparison.ratio(point)) is not None}
    return json.dumps({**comparison.facts, "systems": systems, "best_peer": best, "ratio": ratios}, indent=2) + "\n"


def write(comparison: Comparison, stem: Path) -> list[Path]:
    """Writes STEM.md and STEM.json; returns their paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".md"), stem.with_suffix(".json")]
    paths[0].write_text(markdown(comparison))
    paths[1].write_text(as_json(comparison))
    return paths


def _notes(comparison: Comparison) -> list[str]:
    """Why a figure is missing, or comes from fewer rounds."""
    notes = [
        f"- {system.name}{f' at {point}' if point else ''}: {why}"
        for system in comparison.systems
        for point, why in system.why.items()
    ]
    return ["", "What failed:", "", *notes] if notes else []


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"**{value:.2f}**"
