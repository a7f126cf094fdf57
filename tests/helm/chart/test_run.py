"""The rendered chart runs: its processes, probes, preStop and test pod, and every metric that it asks for is there.

`pods.py` says what stands for a cluster. Metrics carry the labels that the rendered PodMonitor would give them.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chart_files import dashboard_expressions, matches, selectors
from chart_tools import NAMESPACE, RELEASE, named, of_kind
from cluster import Cluster
from pods import IMAGE, Pod, size
from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import Prometheus

from tandem.client import Delta, Finished
from tandem.errors import TandemError
from tandem.record import FinishReason

PROMPT = "One Monday morning a tale began of a fox, a crow and a piece of cheese, and it went on for very long: " * 2
LOOK_AROUND = """
import json, os, pathlib
def read(*paths): return next(path.read_text() for path in map(pathlib.Path, paths) if path.exists())
def writable(path):
    try: pathlib.Path(path, "x").write_text("")
    except OSError: return False
    return True
shm = os.statvfs("/dev/shm")
print(json.dumps({
    "user": [os.getuid(), os.getgid()],
    "capabilities": int(read("/proc/self/status").split("CapEff:")[1].split()[0], 16),
    "memory": int(read("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")),
    "shm": shm.f_frsize * shm.f_blocks,
    "writable": [path for path in ("/", "/opt/tandem", "/tls", "/keys", "/cache", "/tmp") if writable(path)],
}))
"""


@pytest.fixture(scope="module", params=["clear", "mtls"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """All pods up and ready."""
    made = Cluster.make(tmp_path_factory.mktemp(request.param), secure=request.param == "mtls")
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_the_test_pod_gets_an_answer(cluster: Cluster) -> None:
    """The command of `helm test`, as it is rendered."""
    done = cluster.test.run()
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_kv_comes_from_the_prefill_pod(cluster: Cluster) -> None:
    """By the address that the gateway found, and the answer is the same each time."""
    with cluster.connect() as client:
        first, second = (client.generate(PROMPT, max_tokens=16, temperature=0, cache_salt=salt) for salt in "ab")
    assert first.text == second.text
    assert _value(cluster["decode"], "tandem_nixl_bytes_transferred_total") > 0


@pytest.mark.skipif(not IMAGE, reason="a process has the machine's rights and limits: TANDEM_IMAGE=... for containers")
def test_containers_may_do_what_is_rendered_and_no_more(cluster: Cluster) -> None:
    """User, capabilities, memory, shared memory, and what can be written."""
    for role, pod in cluster.pods.items():
        seen = json.loads(pod.execute("python", "-c", LOOK_AROUND))
        user = pod.spec["securityContext"]
        assert seen["user"] == [user["runAsUser"], user["runAsGroup"]]
        assert seen["capabilities"] == 0
        assert seen["memory"] == size(pod.container["resources"]["limits"]["memory"])
        assert seen["writable"] == ["/cache", "/tmp"]
        if role != "gateway":
            assert seen["shm"] == size(pod.volumes["shm"]["emptyDir"]["sizeLimit"])


def test_a_renewed_certificate_is_taken_up(cluster: Cluster) -> None:
    """By every service for its next connection, as the kubelet renews files; what runs goes on to its end."""
    if (pki := cluster.pki) is None:
        pytest.skip("in clear there is no certificate")
    with cluster.connect() as client, client.stream(PROMPT, max_tokens=300, ignore_eos=True, cache_salt="r") as events:
        tokens = len(next(event for event in events if isinstance(event, Delta)).token_ids)
        for role, pod in cluster.pods.items():
            serial, port = pki.issue(role), pod.port("grpc")
            assert pki.presented(role, pod.address, port) != serial
            pod.renew()
            assert pki.presented(role, pod.address, port) == serial
        tokens += sum(len(event.token_ids) for event in events if isinstance(event, Delta))
    assert tokens == 300
    copied = _value(cluster["decode"], "tandem_nixl_bytes_transferred_total")
    with cluster.connect() as client:
        client.generate(PROMPT, max_tokens=4, cache_salt="s")
    assert _value(cluster["decode"], "tandem_nixl_bytes_transferred_total") > copied


def _metrics(pod: Pod) -> list[tuple[str, dict[str, str], float]]:
    with urllib.request.urlopen(f"http://{pod.address}:{pod.port('metrics')}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
    return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]


def _value(pod: Pod, name: str) -> float:
    return sum(value for sample, _, value in _metrics(pod) if sample == name)


def _target_labels(cluster: Cluster, pod: Pod) -> dict[str, str]:
    """What Prometheus Operator and the rendered relabelings add to a pod's series."""
    (monitor,) = of_kind(cluster.documents, "PodMonitor")
    labels = {"namespace": NAMESPACE, "pod": pod.name}
    of_pod = named(cluster.documents, "Deployment", pod.name)["spec"]["template"]["metadata"]["labels"]
    meta = {f"__meta_kubernetes_pod_label_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}": text for name, text in of_pod.items()}
    for rule in monitor["spec"]["podMetricsEndpoints"][0]["relabelings"]:
        labels[rule["targetLabel"]] = ";".join(meta[name] for name in rule["sourceLabels"])
    return labels


def _expressions(documents: list[dict[str, Any]]) -> list[str]:
    """PromQL of the rendered scalers, rules and dashboard."""
    (scaled,) = of_kind(documents, "ScaledObject")
    (rule,) = of_kind(documents, "PrometheusRule")
    board = [text.replace("$namespace", NAMESPACE).replace("$release", RELEASE) for text in dashboard_expressions()]
    return [
        *(trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]),
        *(one["expr"] for group in rule["spec"]["groups"] for one in group["rules"]),
        *board,
    ]


def _fail_once(cluster: Cluster) -> None:
    """A request that no pool can hold."""
    with cluster.connect() as client, pytest.raises(TandemError):
        client.generate(token_ids=[5] * 6000, max_tokens=1)


def test_every_metric_that_is_asked_for_is_there(cluster: Cluster) -> None:
    """Of the scalers, rules and dashboard, after traffic, with the labels that each query chooses by."""
    _fail_once(cluster)
    series: dict[str, list[dict[str, str]]] = {}
    for pod in cluster.pods.values():
        for name, labels, _ in _metrics(pod):
            series.setdefault(name, []).append({**labels, **_target_labels(cluster, pod)})
    asked = [selector for expression in _expressions(cluster.documents) for selector in selectors(expression)]
    assert len(asked) > 60
    missing = {
        metric: wanted
        for metric, wanted in asked
        if not any(
            all(matches(matcher, labels.get(label, "")) for label, matcher in wanted.items())
            for labels in series.get(metric, ())
        )
    }
    assert missing == {}


def test_a_real_prometheus_answers(cluster: Cluster, tmp_path: Path) -> None:
    """Every rule is evaluated without an error, every recorded value, scaler's query and panel has an answer."""
    (rule,) = of_kind(cluster.documents, "PrometheusRule")
    (scaled,) = of_kind(cluster.documents, "ScaledObject")
    targets = [(f"{pod.address}:9401", _target_labels(cluster, pod)) for pod in cluster.pods.values()]
    _fail_once(cluster)
    with Prometheus(tmp_path, rule["spec"], targets) as server, cluster.connect() as client:
        server.ask("tandem_num_requests_running")
        client.generate(PROMPT, max_tokens=16, cache_salt="c")
        for one in scaled["spec"]["triggers"]:
            assert len(server.ask(one["metadata"]["query"])) == 1
        for expression in _expressions(cluster.documents)[len(scaled["spec"]["triggers"]) :]:
            if not _is_alert(rule, expression):
                server.ask(expression.replace("$__rate_interval", "1m"))
        for group in rule["spec"]["groups"]:
            for one in group["rules"]:
                if "record" in one:
                    labels = server.ask(one["record"])[0]["metric"]
                    assert (labels["namespace"], labels["release"]) == (NAMESPACE, RELEASE)
        states = [one for group in server.get("rules")["groups"] for one in group["rules"]]
        assert {(one["name"], one["health"]) for one in states if one["health"] != "ok"} == set()


def _is_alert(rule: dict[str, Any], expression: str) -> bool:
    rules = [one for group in rule["spec"]["groups"] for one in group["rules"]]
    return any("alert" in one and one["expr"] == expression for one in rules)


def test_external_metrics_are_recorded(cluster: Cluster) -> None:
    """What the HorizontalPodAutoscaler names is a recording rule under the adapter's rule of naming."""
    (scaler,) = of_kind(cluster.documents, "HorizontalPodAutoscaler")
    (rule,) = of_kind(cluster.documents, "PrometheusRule")
    recorded = {
        one["record"].replace("tandem:", "tandem_"): one["labels"]
        for group in rule["spec"]["groups"]
        for one in group["rules"]
        if "record" in one
    }
    for metric in scaler["spec"]["metrics"]:
        wanted = metric["external"]["metric"]
        assert wanted["selector"]["matchLabels"].items() <= recorded[wanted["name"]].items()


def test_a_pod_that_still_loads_ends_at_once(cluster: Cluster, tmp_path: Path) -> None:
    """It has nothing to drain, and no grace to wait for: whoever is to follow may need its GPU."""
    pod = cluster.another("prefill", tmp_path)
    pod.start()
    try:
        pod.until(lambda: '"loading"' in pod.log())
        pod.terminate()
        assert pod.await_end(60) == 0
    finally:
        pod.kill()


def test_a_pod_that_ends_finishes_what_it_runs(cluster: Cluster) -> None:
    """preStop, then SIGTERM: not ready, alive, the stream goes on to its end, exit code 0 within the grace."""
    decode, gateway = cluster["decode"], cluster["gateway"]
    with cluster.connect() as client, client.stream(PROMPT, max_tokens=600, ignore_eos=True) as events:
        tokens = len(next(event for event in events if isinstance(event, Delta)).token_ids)
        decode.terminate()
        decode.until(lambda: not decode.probe("readinessProbe"))
        cluster.publish()
        assert decode.probe("livenessProbe"), "it still has the stream"
        rest = list(events)
    tokens += sum(len(event.token_ids) for event in rest if isinstance(event, Delta))
    assert tokens == 600
    assert [event.finish_reason for event in rest if isinstance(event, Finished)] == [FinishReason.LENGTH]
    assert decode.await_end() == 0
    gateway.until(lambda: not gateway.probe("readinessProbe"))
    assert gateway.probe("livenessProbe")
    for pod in (gateway, cluster["prefill"]):
        pod.terminate()
        assert pod.await_end() == 0
