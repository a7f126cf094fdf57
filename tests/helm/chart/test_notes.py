"""What Helm prints after an install: a copy of the chart has it in a ConfigMap, since `helm template` leaves it out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from chart_files import CHART, EXAMPLES
from chart_tools import NAMESPACE, RELEASE, helm, named, objects

CONFIG_MAP = """apiVersion: v1
kind: ConfigMap
metadata: {name: notes}
data:
  text: |
{{ tpl (.Files.Get "notes") . | indent 4 }}
"""


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("notes") / "tandem"
    shutil.copytree(CHART, copy)
    (copy / "templates" / "NOTES.txt").rename(copy / "notes")
    (copy / "templates" / "notes.yaml").write_text(CONFIG_MAP)
    return copy


def notes(chart: Path, example: str) -> str:
    values = next(path for path in EXAMPLES if path.stem == f"{example}-values")
    done = helm("3", "template", RELEASE, chart, "-n", NAMESPACE, "-f", values, "--kube-version", "1.33")
    assert done.returncode == 0, done.stderr
    return str(named(objects(done.stdout), "ConfigMap", "notes")["data"]["text"])


@pytest.mark.parametrize("example", [path.stem.removesuffix("-values") for path in EXAMPLES])
def test_notes_say_what_to_do_next(chart: Path, example: str) -> None:
    text = notes(chart, example)
    assert f"helm -n {NAMESPACE} test {RELEASE}" in text
    assert (
        f"rollout status deployment/{RELEASE}-tandem-gateway --timeout={3600 if example == 'rdma' else 1800}s" in text
    )
    assert "<no value>" not in text


def test_notes_warn_of_what_the_values_bring(chart: Path) -> None:
    demo, mtls, keda = (notes(chart, name) for name in ("cpu-demo", "mtls", "keda"))
    assert "travel in clear" in demo
    assert "Whoever reaches the gateways" in demo
    assert "travel in clear" not in mtls
    assert "--tls-server-name tandem-gateway" in mtls
    assert "starts again from one worker" in keda
    assert "starts again" not in demo
    assert "adapter" in notes(chart, "hpa")
    assert "IPC_LOCK" in notes(chart, "rdma")
