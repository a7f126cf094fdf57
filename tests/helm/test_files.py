"""What can be said of the chart's files without Helm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from chart_files import (
    CHART,
    EXAMPLES,
    ROOT,
    dashboard_expressions,
    expressions,
    load,
    matches,
    rules,
    scaling_queries,
    selectors,
)

import decode_service.metrics
import prefill_service.metrics
from engine import config
from gateway.config import GatewayConfig
from gateway.dispatch import Dispatcher
from gateway.pairing import Pairing
from gateway.pool import WorkerPool
from gateway.pool_metrics import PoolMetrics
from tandem.service import metrics as common
from tandem.service.metrics import Metrics

LABELS_OF_TARGETS = {"namespace": "NAMESPACE", "release": "RELEASE"}
"""What Prometheus adds to each series, as far as queries choose by it."""


def test_the_readme_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "helm-readme"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def _objects(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if "properties" in schema and schema.get("type") == "object":
            yield path, schema
        for key, value in schema.items():
            yield from _objects(value, f"{path}/{key}")


def test_the_schema_is_closed() -> None:
    """A misspelt value is an error, wherever it stands."""
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    found = dict(_objects(schema))
    assert len(found) > 30
    assert [path for path, part in found.items() if part.get("additionalProperties") is not False] == []


def _property_paths(schema: dict[str, Any], part: dict[str, Any], prefix: str = "") -> Iterator[str]:
    if "$ref" in part:
        part = schema["definitions"][part["$ref"].rpartition("/")[2]]
    for name, inner in part.get("properties", {}).items():
        path = f"{prefix}{name}"
        yield path
        yield from _property_paths(schema, inner, f"{path}.")


def _value_paths(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _value_paths(value, f"{prefix}{name}.")


def test_values_and_schema_have_the_same_keys() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    known = set(_property_paths(schema, schema)) - {"global"}
    written = set(_value_paths(load(CHART / "values.yaml")))
    free = {"monitoring.dashboard.labels.grafana_dashboard"}  # below a map of labels
    maps = {f"{role}.{name}" for role in ("gateway", "prefill", "decode") for name in ("rollout", "resources")}
    inner = {path for path in written if any(path.startswith(f"{one}.") for one in maps)}
    assert written - free - inner <= known
    assert {path for path in known if path.rpartition(".")[0] not in maps} <= written


def test_both_roles_have_the_same_values() -> None:
    values = load(CHART / "values.yaml")
    assert set(_value_paths(values["prefill"])) == set(_value_paths(values["decode"]))


def _registry(role: str) -> Any:
    """The metrics of a process of `role`, made as it makes them."""
    metrics = Metrics(role)
    if role == "prefill":
        prefill_service.metrics.StepMetrics(metrics).watch_backlog(lambda: 0, lambda: 0.0)
    if role == "decode":
        decode_service.metrics.StepMetrics(metrics).watch_leases(lambda: 0, lambda: 0)
    if role == "gateway":
        pool = WorkerPool()
        dispatcher = Dispatcher(pool, Pairing(pool, GatewayConfig()), GatewayConfig())
        metrics.registry.register(PoolMetrics(pool, dispatcher))
    metrics.request_success.inc(finished_reason="stop")
    metrics.request_failure.inc(code="INTERNAL")
    return metrics.registry


@pytest.fixture(scope="module")
def series() -> dict[str, list[dict[str, str]]]:
    """The labels of each series that some process has, by metric."""
    found: dict[str, list[dict[str, str]]] = {}
    for role in ("gateway", "prefill", "decode"):
        for family in _registry(role).collect():
            for sample in family.samples:
                found.setdefault(sample.name, []).append({**sample.labels, **LABELS_OF_TARGETS})
    return found


@pytest.mark.parametrize("expression", expressions())
def test_every_selector_finds_a_series(expression: str, series: dict[str, list[dict[str, str]]]) -> None:
    """Each metric is one that a process of that role has, with the labels that the query chooses by."""
    filled = expression.replace("TTFT_LIMIT", "2.5").replace("ITL_LIMIT", "0.1").replace("ROLES", "decode")
    for variable, value in LABELS_OF_TARGETS.items():
        filled = filled.replace(f"${variable}", value)
    found = selectors(filled)
    assert found or "tandem:" in filled
    for metric, wanted in found:
        assert metric in series, metric
        assert any(
            all(matches(matcher, labels.get(label, "")) for label, matcher in wanted.items())
            for labels in series[metric]
        ), (metric, wanted)


@pytest.mark.parametrize("expression", expressions())
def test_every_selector_is_pinned(expression: str) -> None:
    """To namespace, release and role: another release's pools, or the gateway's own count, never get in."""
    for metric, wanted in selectors(expression):
        assert {"namespace", "release"} <= wanted.keys(), metric
        assert "role" in wanted or metric == "tandem_integrity_failures_total"
    bare = re.findall(r"\b(tandem_\w+)(?![\w{])", expression)
    assert [name for name in bare if name not in dict(selectors(expression))] == []


def test_what_scales_a_pool_never_goes_blank() -> None:
    """A query without an answer would stop the scaler: it is 0 then."""
    for _, query in scaling_queries():
        assert query["query"].rstrip().endswith("or vector(0)")
        assert query["type"] in ("AverageValue", "Value")
    targets = load(CHART / "values.yaml")["scaling"]
    assert {(role, query["target"]) for role, query in scaling_queries()} == {
        (role, target) for role in ("prefill", "decode") for target in targets[role]
    }


def test_limits_are_buckets_of_their_histograms() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    assert tuple(schema["definitions"]["bucket"]["enum"]) == common.LATENCY_BUCKETS
    limits = load(CHART / "values.yaml")["monitoring"]["rules"]
    assert {limits["ttftLimitSeconds"], limits["itlLimitSeconds"]} <= set(common.LATENCY_BUCKETS)


def test_every_alert_says_what_to_do() -> None:
    """docs/operations.md has a row for each, and none for others."""
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    assert set(re.findall(r"^\| `(Tandem\w+)` \|", text, re.MULTILINE)) == alerts


def test_the_dashboard_shows_what_it_is_for() -> None:
    shown = "".join(dashboard_expressions())
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "nixl_xfer_time_seconds"):
        assert f"increase(tandem_{name}_bucket" in shown
    assert "spec_decode_num_accepted_tokens_total" in shown
    board = json.loads((CHART / "files" / "dashboard.json").read_text("utf-8"))
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))


def test_there_is_an_example_of_each_kind() -> None:
    names = {path.stem.removesuffix("-values") for path in EXAMPLES}
    assert names >= {"cpu-demo", "gpu", "rdma", "mtls", "keda", "pvc"}


def test_engines_take_what_the_chart_lets_through() -> None:
    """A choice that an engine doesn't know would end each pod; one that the chart doesn't know can't be made."""
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))["properties"]["engine"]["properties"]
    assert set(schema["device"]["enum"]) == set(config.DEVICES)
    assert set(schema["compute"]["enum"]) == {*config.COMPUTES, *config.GPU_COMPUTES}
    assert set(schema["attention"]["enum"]) == set(config.ATTENTIONS)
    assert set(schema["dtype"]["enum"]) == {*config.DTYPES, *config.GPU_DTYPES}
    assert set(schema["kvDtype"]["enum"]) == {*config.KV_DTYPES, *config.GPU_KV_DTYPES}
