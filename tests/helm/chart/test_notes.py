"""What Helm prints after an install: a copy of the chart has it in a ConfigMap, since `helm template` leaves it out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from chart_files import CHART, EXAMPLES
from chart_tools import NAMESPACE, RELEASE, helm, named, objects

from tandem.cli.generate import command

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


def notes(chart: Path, example: str, *settings: str) -> str:
    values = next(path for path in EXAMPLES if path.stem == f"{example}-values")
    sets = [part for setting in settings for part in ("--set", setting)]
    done = helm("3", "template", RELEASE, chart, "-n", NAMESPACE, "-f", values, "--kube-version", "1.33", *sets)
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
    assert "starts again from one worker" in keda
    assert "starts again" not in demo
    assert "adapter" in notes(chart, "hpa")
    assert "IPC_LOCK" in notes(chart, "rdma")


def test_notes_have_a_call_that_gets_in(chart: Path) -> None:
    """With what the gateways ask of clients, by flags that the client has."""
    assert '     tandem generate "Once upon a time"\n' in notes(chart, "cpu-demo")
    (call,) = [line for line in notes(chart, "mtls").splitlines() if "tandem generate" in line]
    key, _, flags = call.partition(" tandem ")
    assert key.split() == ["TANDEM_API_KEY=..."]
    known = {option for parameter in command.params for option in parameter.opts}
    asked = {"--tls-ca", "--tls-server-name", "--tls-cert", "--tls-key"}
    assert {word for word in flags.split() if word.startswith("--")} == asked <= known


def test_notes_speak_of_a_test_that_is_there(chart: Path) -> None:
    text = notes(chart, "cpu-demo", "test.enabled=false")
    assert "helm -n" not in text
    assert "2. Call it" in text
