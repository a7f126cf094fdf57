"""promtool on the rules and queries that the chart renders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml
from chart_files import EXAMPLES, ROOT, load
from chart_tools import objects, of_kind, rendered, run

STORIES = ROOT / "tests" / "helm" / "rules_test.yaml"


def _documents() -> list[dict[str, Any]]:
    return objects(rendered(next(path for path in EXAMPLES if path.stem == "keda-values")))


def _rules() -> dict[str, Any]:
    (rule,) = of_kind(_documents(), "PrometheusRule")
    spec: dict[str, Any] = rule["spec"]
    return spec


def test_promtool_takes_every_rule(tmp_path: Path) -> None:
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(_rules()))
    done = run("promtool", "check", "rules", "--lint=all", "--lint-fatal", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_stories_end_as_they_should(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(_rules()))
    shutil.copy(STORIES, tmp_path)
    done = run("promtool", "test", "rules", tmp_path / STORIES.name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_pool_of_none_is_not_missed() -> None:
    """Without prefill workers decode computes prompts itself."""
    (rule,) = of_kind(objects(rendered(None, "monitoring.rules.enabled=true", "prefill.replicas=0")), "PrometheusRule")
    texts = [one["expr"] for group in rule["spec"]["groups"] for one in group["rules"] if "alert" in one]
    assert [text.count('worker_role=~"decode"') for text in texts if "worker_role=~" in text] == [1]


def test_every_rule_is_in_a_story() -> None:
    """Each alert fires in one and is silent in another; each recorded value is asked for."""
    stories = load(STORIES)["tests"]
    rules = [rule for group in _rules()["groups"] for rule in group["rules"]]
    for rule in rules:
        if "alert" in rule:
            told = [
                bool(one["exp_alerts"])
                for story in stories
                for one in story["alert_rule_test"]
                if one["alertname"] == rule["alert"]
            ]
            assert set(told) == {True, False}, rule["alert"]
        else:
            asked = [one["expr"] for story in stories for one in story["promql_expr_test"]]
            assert any(rule["record"] in expression for expression in asked), rule["record"]


def test_scalers_ask_what_is_recorded() -> None:
    """One query is told once: KEDA's trigger and the recording rule that HPAs use are the same text."""
    queries = [
        trigger["metadata"]["query"]
        for scaled in of_kind(_documents(), "ScaledObject")
        for trigger in scaled["spec"]["triggers"]
    ]
    (group,) = [group for group in _rules()["groups"] if group["name"] == "tandem.scaling"]
    assert sorted(queries) == sorted(rule["expr"] for rule in group["rules"])
    assert len(queries) == 5
