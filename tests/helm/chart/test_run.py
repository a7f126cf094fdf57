"""The rendered chart runs: its processes, probes, preStop and test pod, and every metric that it asks for is there.

`pods.py` says what stands for a cluster. Metrics carry the labels that the rendered PodMonitor would give them.
"""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import ApiServer
from certificates import Authority
from chart_files import dashboard_expressions, matches, selectors
from chart_tools import NAMESPACE, RELEASE, named, objects, of_kind, rendered
from pods import Pod
from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import Prometheus

from kernels.build import cache_dir
from tandem.client import Client, Delta, Finished
from tandem.errors import TandemError
from tandem.record import FinishReason

COMPONENTS = ("prefill", "decode", "gateway")
SMALL = {
    "longestGenerationSeconds": 300,
    "gateway": {"replicas": 1, "drainSeconds": 300, "preStopSeconds": 1},
    "monitoring": {"podMonitor": {"enabled": True}, "rules": {"enabled": True}, "dashboard": {"enabled": True}},
    **{
        role: {
            "drainSeconds": 300,
            "preStopSeconds": 1,
            "threads": 1,
            "kvMemory": 64 << 20,
            "autoscaling": {"mode": mode},
        }
        for role, mode in (("prefill", "keda"), ("decode", "hpa"))
    },
}
KEY = "a-key-of-32-characters-and-no-less"
MTLS = {
    "tls": {
        "enabled": True,
        "secrets": {role: f"{role}-tls" for role in COMPONENTS},
        "clientCertificates": True,
        "testSecret": "client-tls",
    },
    "apiKeys": {"secretName": "keys", "testSecret": {"name": "test-key"}},
    "gateway": {**SMALL["gateway"], "discovery": "endpointslices"},
}
PROMPT = "One Monday morning a tale began of a fox, a crow and a piece of cheese, and it went on for very long: " * 2


@dataclass
class Cluster:
    """The pods of one rendering."""

    documents: list[dict[str, Any]]
    pods: dict[str, Pod]
    test: Pod
    client: dict[str, Any] = field(default_factory=dict)
    api: ApiServer | None = None

    def publish(self) -> None:
        """Each worker's readiness is in its Service's EndpointSlice now; DNS needs nobody to say so here."""
        for role in ("prefill", "decode"):
            if self.api is not None:
                self.api.publish(self[role].name, self[role].address, ready=self[role].probe("readinessProbe"))

    def connect(self) -> Client:
        """A client of the gateway's Service."""
        return Client(f"{self.pods['gateway'].address}:50051", **self.client)

    def __getitem__(self, role: str) -> Pod:
        return self.pods[role]


def _secrets(folder: Path) -> tuple[dict[str, dict[str, bytes]], dict[str, Any]]:
    """Contents of every Secret that MTLS names, and what a client needs."""
    folder.mkdir()
    authority, found = Authority(folder), {}
    for name in (*COMPONENTS, "client"):
        issued = authority.issue(name, f"tandem-{name}")
        pairs = {"tls.crt": issued.cert, "tls.key": issued.key, "ca.crt": issued.ca}
        found[f"{name}-tls"] = {key: path.read_bytes() for key, path in pairs.items()}
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    found["keys"] = {"keys.json": f'{{"alice": ["{digest}"]}}'.encode()}
    found["test-key"] = {"key": KEY.encode()}
    client = {"tls_ca": folder / "authority.pem", "tls_cert": folder / "client.crt", "tls_key": folder / "client.key"}
    return found, {**client, "tls_server_name": "tandem-gateway", "api_key": KEY}


def _pods(documents: list[dict[str, Any]], folder: Path, secrets: Any) -> tuple[dict[str, Pod], Pod]:
    net = f"127.{random.randint(1, 250)}.{random.randint(1, 250)}"
    addresses = {role: f"{net}.{number}" for number, role in enumerate(COMPONENTS, 1)}
    names = {
        f"{RELEASE}-tandem-{role}.{NAMESPACE}.svc.cluster.local{end}": address
        for end in (".", "")  # with its dot first: each is replaced by the address
        for role, address in addresses.items()
    }
    made = {}
    for role in (*COMPONENTS, "test"):
        (folder / role).mkdir()
        found = named(documents, "Pod" if role == "test" else "Deployment", f"-{role}")
        spec = found["spec"] if role == "test" else found["spec"]["template"]["spec"]
        made[role] = Pod(found["metadata"]["name"], spec, addresses, folder / role, secrets, names)
    return made, made.pop("test")


@pytest.fixture(scope="module", params=["clear", "mtls"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """All pods up and ready, one after another as their probes say."""
    folder = tmp_path_factory.mktemp(request.param)
    values = folder / "values.yaml"
    values.write_text(yaml.safe_dump({**SMALL, **(MTLS if request.param == "mtls" else {})}))
    documents = objects(rendered(values))
    secure = request.param == "mtls"
    secrets, client = _secrets(folder / "pki") if secure else ({}, {})
    pods, test = _pods(documents, folder, secrets)
    made = Cluster(documents, pods, test, client, ApiServer(folder) if secure else None)
    try:
        _start(made)
        yield made
    finally:
        for pod in pods.values():
            pod.kill()
        if made.api is not None:
            made.api.close()


def _start(cluster: Cluster) -> None:
    for role, pod in cluster.pods.items():
        if cluster.api is not None:
            pod.account, pod.given = cluster.api.account, cluster.api.environment
        if role != "gateway":  # the cache volume of a pod that has run here before: its kernels are compiled
            shutil.copytree(cache_dir(), pod.mounts()["/cache"] / "tandem" / "kernels")
        pod.start()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        for role, pod in cluster.pods.items():
            if role == "gateway":
                cluster.publish()
            pod.await_probe(probe)


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


def _metrics(pod: Pod) -> list[tuple[str, dict[str, str], float]]:
    port = next(port["containerPort"] for port in pod.container["ports"] if port["name"] == "metrics")
    with urllib.request.urlopen(f"http://{pod.address}:{port}/metrics", timeout=10) as response:
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
