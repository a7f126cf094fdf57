"""The autoscale simulator: queries as Prometheus reads them, the controller, the pools, and the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.autoscale.__main__ import main
from bench.autoscale.cluster import Cluster
from bench.autoscale.machines import DecodeWorker, Machine, PrefillWorker, Request
from bench.autoscale.promql import compile_query
from bench.autoscale.rules import Pace, Rule, Scaler, load_pace, load_rules
from bench.autoscale.scrapes import Scrapes, extrapolated_rate
from bench.autoscale.trace import Arrival, Day, read_trace, synthetic
from tandem.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def scraped(*rounds: dict[tuple[str, tuple[tuple[str, str], ...]], float], every: float = 15.0) -> Scrapes:
    scrapes = Scrapes()
    for number, samples in enumerate(rounds):
        scrapes.scrape(number * every, {(name, frozenset(labels)): v for (name, labels), v in samples.items()})
    return scrapes


def series(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


def ask(query: str, *rounds: dict[tuple[str, tuple[tuple[str, str], ...]], float]) -> float:
    return compile_query(query)(scraped(*rounds))


# -- queries


@pytest.mark.parametrize(
    ("query", "value"),
    [
        ("1 + 2 * 3 - 8 / 4", 5.0),
        ("sum(x)", 6.0),
        ("sum(x) / count(x)", 2.0),
        ('sum(x{pod="a"})', 1.0),
        ('sum(x{pod!="a"})', 5.0),
        ('max(x{pod=~"a|b"}) + min(x{pod!~"a"})', 4.0),
        ("sum(x > 1.5)", 5.0),
        ("avg(x) > 7 or vector(0)", 0.0),
        ("sum(absent) or vector(3)", 3.0),
        ("count(x) * (sum(x) > 2) or vector(0)", 18.0),
        ("clamp_max(sum(x), 4) + clamp_min(sum(x), 7)", 11.0),
        ("sum by (kind) (x) / sum(x) by (kind)", 1.0),
    ],
)
def test_queries(query: str, value: float) -> None:
    now = {series("x", pod=pod, kind="k"): float(number) for number, pod in enumerate("abc", 1)}
    assert ask(query, now) == value


def test_a_worker_that_left_is_not_seen() -> None:
    both, one = {series("x", pod="a"): 1.0, series("x", pod="b"): 2.0}, {series("x", pod="a"): 1.0}
    assert ask("sum(x)", both, one) == 1.0


def test_rates_are_extrapolated_and_survive_restarts() -> None:
    """15 s between samples, 60 s asked for: the increase of 45 s stands for 60 s; a counter that fell began anew."""
    steady = [{series("c"): 100.0 + 30.0 * number} for number in range(8)]
    assert ask("sum(rate(c[1m]))", *steady) == pytest.approx(2.0)
    fell = [{series("c"): value} for value in (100.0, 130.0, 30.0, 60.0, 90.0)]
    assert ask("rate(c[1m])", *fell) == pytest.approx(2.0)
    assert extrapolated_rate([(0.0, 0.0), (15.0, 30.0)], -45.0, 15.0) == pytest.approx(0.5), "it began at zero"


def test_quantiles_of_histograms() -> None:
    def buckets(*counts: float) -> dict[Any, float]:
        return {series("h_bucket", le=le): count for le, count in zip(("0.1", "0.5", "+Inf"), counts, strict=True)}

    query = "histogram_quantile(0.5, sum by (le) (rate(h_bucket[1m])))"
    assert ask(query, buckets(0, 0, 0), buckets(0, 10, 10)) == pytest.approx(0.3)
    assert ask(query, buckets(0, 0, 0), buckets(0, 0, 10)) == 0.5
    assert math.isnan(ask(query, buckets(4, 4, 4), buckets(4, 4, 4)))
    assert ask(f"({query} > 0) or vector(0)", buckets(4, 4, 4), buckets(4, 4, 4)) == 0.0


@pytest.mark.parametrize(
    "query", ["sum(x", "topk(1, x)", "x[5m]", "rate(x)", "sum(x) and y", "x[1w]", "sum(x) @ 1", "1 > 2"]
)
def test_what_is_not_understood_is_refused(query: str) -> None:
    with pytest.raises(ConfigError, match="query"):
        compile_query(query)(Scrapes())


# -- rules


def rendered_triggers() -> dict[str, Any]:
    """What the chart renders for KEDA, by role."""
    documents = yaml.safe_load_all((ROOT / "tests" / "helm" / "golden" / "keda.yaml").read_text("utf-8"))
    return {
        document["metadata"]["labels"]["app.kubernetes.io/component"]: document["spec"]
        for document in documents
        if document and document["kind"] == "ScaledObject"
    }


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_what_is_simulated_is_what_the_chart_renders(role: str) -> None:
    """Queries, targets and paces, to the letter."""
    spec = rendered_triggers()[role]
    triggers = [(t["metadata"]["query"], float(t["metadata"]["threshold"]), t["metricType"]) for t in spec["triggers"]]
    rules = load_rules(namespace="serving", release="demo")[role]
    assert [(rule.query, rule.target, rule.kind) for rule in rules] == triggers
    behavior, pace = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"], load_pace()
    (up,), (down,) = behavior["scaleUp"]["policies"], behavior["scaleDown"]["policies"]
    assert [(one["type"], one["value"]) for one in (up, down)] == [("Pods", 1)] * 2
    assert (up["periodSeconds"], down["periodSeconds"]) == (pace.up, pace.down)
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] == pace.window
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0


@pytest.mark.parametrize(
    ("kind", "value", "workers", "wish"),
    [
        ("AverageValue", 4.3, 2, 2),  # within the tolerance
        ("AverageValue", 4.5, 2, 3),
        ("AverageValue", 0.0, 3, 0),
        ("AverageValue", math.nan, 3, 3),
        ("Value", 4.0, 3, 6),
        ("Value", 2.1, 3, 3),
        ("Value", 1.0, 3, 2),
    ],
)
def test_wishes(kind: str, value: float, workers: int, wish: int) -> None:
    assert Rule("r", "", 2.0, kind).wish(value, workers) == wish


def test_one_up_at_a_time_and_down_only_after_a_window() -> None:
    rule = Rule("r", "sum(x) or vector(0)", 1.0, "AverageValue")
    scaler, workers, sizes = Scaler([rule], Pace(up=60, down=120, window=90, least=1, most=3)), 1, []
    for number in range(40):
        now = number * 15.0
        scrapes = Scrapes()
        scrapes.scrape(now, {("x", frozenset()): 5.0 if now < 200 else 0.0})
        if (workers := scaler.look(now, scrapes, workers)) != (sizes[-1][1] if sizes else 1):
            sizes.append((now, workers))
    # 195 s was the last look with a wish for more; it counts for 90 s, and then one goes in 120 s.
    assert sizes == [(0.0, 2), (60.0, 3), (300.0, 2), (420.0, 1)]


# -- pools


def test_a_prefill_worker_computes_in_order() -> None:
    worker = PrefillWorker("p", Machine(prefill_rate=100.0), 0.0)
    first, second = Request(Arrival(0.0, 200, 1)), Request(Arrival(0.0, 100, 1))
    worker.take(1.0, first)
    worker.take(1.5, second)
    assert worker.backlog(2.0) == 2.0
    assert list(worker.finished(2.9)) == []
    assert list(worker.finished(4.0)) == [(3.0, first), (4.0, second)]
    assert {name: value for name, _, value in worker.samples(4.0)}["tandem_engine_step_seconds_sum"] == 3.0


def test_a_decode_worker_slows_down_with_its_batch_and_loses_no_token() -> None:
    worker = DecodeWorker("d", Machine(step_base=0.5, step_per_sequence=0.25, kv_tokens=1000), 0.0)
    one, two = Request(Arrival(0.0, 100, 10)), Request(Arrival(0.0, 200, 4))
    for request in (one, two):
        worker.receiving[request] = request.tokens
        worker.begin(request)
    assert worker.step_seconds() == 1.0
    assert worker.advance(3.0) == []
    assert worker.kv_used == 306
    worker.evict(one)
    assert (one.emitted, one.left, one.tokens) == (3.0, 7.0, 103)
    assert worker.advance(0.75) == [two]
    assert worker.kv_used == 0
    worker.receiving[one] = one.tokens
    worker.begin(one)
    assert worker.advance(0.75 * 7) == [one]


def test_pools_follow_a_burst_and_every_request_ends() -> None:
    """A drain shorter than a stream: streams of workers that leave go on elsewhere."""
    day = Day(hours=1.0, quiet=0.2, busy=3.0, bursts=1)
    machine, pace = Machine(start=30.0, drain=1.0), Pace(60, 60, 60, least=1, most=6)
    arrivals = synthetic(day, seed=3)
    cluster = Cluster(machine, {"prefill": 1, "decode": 1}, load_rules(), {"prefill": pace, "decode": pace})
    result = cluster.run(arrivals)
    assert result.unfinished == 0
    assert result.migrations > 0
    for role in ("prefill", "decode"):
        assert result.most[role] > 1
        assert result.looks[-1].ordered[role] < result.most[role]
        assert len(arrivals) == len(result.requests)
    assert all(request.done >= request.first >= request.arrival.at for request in result.requests)


# -- traces and the command


def test_the_same_seed_gives_the_same_day() -> None:
    day = Day(hours=0.2)
    assert synthetic(day, 1) == synthetic(day, 1) != synthetic(day, 2)


def test_traces_of_files(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("prompt_tokens,at,output_tokens\n5,2.5,3\n7,1,1\n")
    assert read_trace(path) == [Arrival(1.0, 7, 1), Arrival(2.5, 5, 3)]
    for bad in ("", "at\n1\n", "at,prompt_tokens,output_tokens\n1,0,1\n", "at,prompt_tokens,output_tokens\nx,1,1\n"):
        path.write_text(bad)
        with pytest.raises(ConfigError, match="--trace"):
            read_trace(path)


def test_the_command_writes_rows_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    main(["--hours", "0.2", "--json", "--markdown", str(page)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["way"] for row in rows] == ["scaled", "fixed, as many on average", "fixed, as many as at most"]
    assert all(row["failed"] == 0 for row in rows)
    text = page.read_text()
    assert text.count("```mermaid") == 1 + 2 + sum(map(len, load_rules().values()))
    assert "python -m bench.autoscale --hours 0.2" in text
    assert load_pace().up > 0
