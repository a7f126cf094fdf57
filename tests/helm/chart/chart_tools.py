"""The tools of scripts/helm-tools, and the chart as they render it."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from chart_files import CHART

TOOLS = Path(os.environ["TANDEM_HELM_TOOLS"])
MAJORS = ("3", "4")
VERSIONS = ("1.29", "1.33", "1.37")
RELEASE, NAMESPACE = "demo", "serving"


def run(*command: str | Path, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs to the end; never raises for an exit code."""
    environment = {**os.environ, "HELM_CACHE_HOME": str(TOOLS / "helm-cache"), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, timeout=timeout, **options
    )


def helm(major: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """One of both majors."""
    return run(TOOLS / major / "helm", *arguments)


@functools.cache
def rendered(
    values: Path | None = None,
    *settings: str,
    major: str = "3",
    kube: str = "1.33",
    release: str = RELEASE,
) -> str:
    """The manifests. Raises AssertionError with Helm's words."""
    done = template(values, *settings, major=major, kube=kube, release=release)
    assert done.returncode == 0, done.stderr
    return done.stdout


def template(
    values: Path | None, *settings: str, major: str = "3", kube: str = "1.33", release: str = RELEASE
) -> subprocess.CompletedProcess[str]:
    """`helm template`; `settings` as for --set."""
    files = ["-f", str(values)] if values is not None else []
    sets = [part for setting in settings for part in ("--set", setting)]
    return helm(major, "template", release, CHART, "-n", NAMESPACE, "--kube-version", kube, *files, *sets)


def objects(text: str) -> list[dict[str, Any]]:
    """The documents of a stream."""
    return [document for document in yaml.safe_load_all(text) if document]


def of_kind(documents: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """Those of some kinds."""
    return [document for document in documents if document["kind"] in kinds]


def named(documents: list[dict[str, Any]], kind: str, ending: str) -> dict[str, Any]:
    """The one whose name ends so."""
    (found,) = [one for one in of_kind(documents, kind) if one["metadata"]["name"].endswith(ending)]
    return found


def pod_specs(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, spec) of everything that becomes a pod."""
    for document in documents:
        if document["kind"] == "Deployment":
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]
        elif document["kind"] == "Pod":
            yield document["metadata"]["name"], document["spec"]


def flags_of(container: dict[str, Any]) -> dict[str, str]:
    """--flag=value arguments; the last of several."""
    return dict(argument.partition("=")[::2] for argument in container["args"])
