"""The chart's files, as plain data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "tandem"
EXAMPLES = sorted((CHART / "ci").glob("*-values.yaml"))
SELECTOR = re.compile(r"\b(tandem_\w+)\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')


def load(path: Path) -> Any:
    """One YAML or JSON file of the chart."""
    return yaml.safe_load(path.read_text("utf-8"))


def rules() -> list[dict[str, Any]]:
    """Every rule of files/rules.yaml."""
    return [rule for group in load(CHART / "files" / "rules.yaml")["groups"] for rule in group["rules"]]


def scaling_queries() -> Iterator[tuple[str, Mapping[str, str]]]:
    """(role, query) of files/queries.yaml."""
    for role, queries in load(CHART / "files" / "queries.yaml").items():
        for query in queries:
            yield role, query


def dashboard_expressions() -> list[str]:
    """What the dashboard's panels ask for."""
    board = json.loads((CHART / "files" / "dashboard.json").read_text("utf-8"))
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


def expressions() -> list[str]:
    """All PromQL of the chart."""
    return [
        *(query["query"] for _, query in scaling_queries()),
        *(rule["expr"] for rule in rules()),
        *dashboard_expressions(),
    ]


def selectors(expression: str) -> list[tuple[str, dict[str, tuple[str, str]]]]:
    """(metric, {label: (operator, value)}) of each selector of a Tandem metric, not of a recording rule."""
    return [
        (metric, {label: (operator, value) for label, operator, value in MATCHER.findall(inner)})
        for metric, inner in SELECTOR.findall(expression)
    ]


def matches(matcher: tuple[str, str], value: str) -> bool:
    """Whether a label's value passes a matcher."""
    operator, wanted = matcher
    fits = re.fullmatch(wanted, value) is not None if "~" in operator else wanted == value
    return fits != operator.startswith("!")
