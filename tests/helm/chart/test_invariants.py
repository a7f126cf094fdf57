"""What must hold of every example, and what the chart refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from chart_files import EXAMPLES
from chart_tools import flags_of, named, objects, of_kind, pod_specs, rendered, template

EVERY_EXAMPLE = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
SERVICES = ("gateway", "prefill", "decode")
TLS = ["tls.enabled=true", *(f"tls.secrets.{service}={service}-tls" for service in SERVICES)]


def deployments(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = of_kind(documents, "Deployment")
    assert len(found) == len(SERVICES)
    return found


def labels_of_pods(documents: list[dict[str, Any]]) -> list[dict[str, str]]:
    pods = [one["metadata"]["labels"] for one in of_kind(documents, "Pod")]
    return [one["spec"]["template"]["metadata"]["labels"] for one in deployments(documents)] + pods


@EVERY_EXAMPLE
def test_replicas_or_a_scaler_never_both(example: Path) -> None:
    """Server-side apply would fight the scaler over the field."""
    documents = objects(rendered(example))
    scaled = [
        one["spec"]["scaleTargetRef"]["name"] for one in of_kind(documents, "HorizontalPodAutoscaler", "ScaledObject")
    ]
    assert len(scaled) == len(set(scaled))
    for one in deployments(documents):
        assert ("replicas" in one["spec"]) != (one["metadata"]["name"] in scaled)


@EVERY_EXAMPLE
def test_selectors_of_two_releases_do_not_meet(example: Path) -> None:
    ours, theirs = objects(rendered(example)), objects(rendered(example, release="other"))
    for one in of_kind(ours, "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor"):
        selector = one["spec"].get("selector") or one["spec"].get("podSelector")
        wanted = selector.get("matchLabels", selector)
        chosen = [labels for labels in labels_of_pods(ours) if wanted.items() <= labels.items()]
        assert len(chosen) == (3 if one["kind"] == "PodMonitor" else 1) or one["kind"] == "PodMonitor"
        assert chosen
        assert [labels for labels in labels_of_pods(theirs) if wanted.items() <= labels.items()] == []
    names = {(one["kind"], one["metadata"]["name"]) for one in ours}
    assert not names & {(one["kind"], one["metadata"]["name"]) for one in theirs}


@EVERY_EXAMPLE
def test_every_port_that_is_named_exists(example: Path) -> None:
    documents = objects(rendered(example))
    ports = {}
    for one in deployments(documents):
        (container,) = one["spec"]["template"]["spec"]["containers"]
        ports[one["metadata"]["labels"]["app.kubernetes.io/component"]] = {
            port["name"]: port["containerPort"] for port in container["ports"]
        }
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert (
                container[probe]["grpc"]["port"]
                in ports[one["metadata"]["labels"]["app.kubernetes.io/component"]].values()
            )
    for one in of_kind(documents, "Service"):
        component = one["spec"]["selector"]["app.kubernetes.io/component"]
        for port in one["spec"]["ports"]:
            assert ports[component][port["targetPort"]] == port["port"]
    for one in of_kind(documents, "NetworkPolicy"):
        component = one["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        for rule in one["spec"]["ingress"]:
            assert {port["port"] for port in rule.get("ports", ())} <= ports[component].keys()
    for one in of_kind(documents, "PodMonitor"):
        assert all(end["port"] in names for end in one["spec"]["podMetricsEndpoints"] for names in ports.values())
    services = {
        (one["metadata"]["name"], port["port"])
        for one in of_kind(documents, "Service")
        for port in one["spec"]["ports"]
    }
    for one in of_kind(documents, "GRPCRoute", "HTTPRoute"):
        backends = [(end["name"], end["port"]) for rule in one["spec"]["rules"] for end in rule["backendRefs"]]
        assert set(backends) <= services


@EVERY_EXAMPLE
def test_flags_bind_the_ports_of_the_container(example: Path) -> None:
    for _, spec in pod_specs(deployments(objects(rendered(example)))):
        (container,) = spec["containers"]
        flags = flags_of(container)
        bound = {flags["--listen"], flags["--health"], flags.get("--metrics") or flags["--http"]}
        assert bound == {f"0.0.0.0:{port['containerPort']}" for port in container["ports"]}


def test_ipv6_binds_everything() -> None:
    for _, spec in pod_specs(deployments(objects(rendered(None, "bindAddress=[::]")))):
        flags = flags_of(spec["containers"][0])
        bound = [flags["--listen"], flags["--health"], flags.get("--metrics") or flags["--http"]]
        assert [address.rpartition(":")[0] for address in bound] == ["[::]"] * 3


@EVERY_EXAMPLE
def test_the_grace_outlasts_drain_and_prestop(example: Path) -> None:
    documents = objects(rendered(example))
    (timeout,) = {
        flags_of(spec["containers"][0])["--default-timeout"]
        for name, spec in pod_specs(documents)
        if name.endswith("-gateway")
    }
    for _, spec in pod_specs(deployments(documents)):
        (container,) = spec["containers"]
        drain = int(flags_of(container)["--drain-grace"])
        (command, seconds) = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == "sleep"
        assert drain >= int(timeout)
        assert spec["terminationGracePeriodSeconds"] > drain + int(seconds) + 5


@EVERY_EXAMPLE
def test_probes_wait_for_the_model_and_not_for_the_dead(example: Path) -> None:
    for name, spec in pod_specs(deployments(objects(rendered(example)))):
        (container,) = spec["containers"]
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= (120 if name.endswith("-gateway") else 1800)
        assert container["readinessProbe"]["grpc"]["service"] == ""
        assert container["livenessProbe"]["grpc"]["service"] == "liveness"


@EVERY_EXAMPLE
def test_secrets_come_by_reference_alone(example: Path) -> None:
    documents = objects(rendered(example))
    assert of_kind(documents, "Secret") == []
    for _, spec in pod_specs(documents):
        for container in spec["containers"]:
            for variable in container["env"]:
                if re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"]
                    assert "value" not in variable


@EVERY_EXAMPLE
def test_every_pod_is_restricted(example: Path) -> None:
    """The restricted pod security standard, and a read-only root besides."""
    for name, spec in pod_specs(objects(rendered(example))):
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] > 0
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any(spec.get(field) for field in ("hostNetwork", "hostPID", "hostIPC"))
        for container in [*spec["containers"], *spec.get("initContainers", ())]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["readOnlyRootFilesystem"] is True
            assert container["resources"]["limits"]["memory"], name
            assert container["resources"]["requests"]["cpu"], name
        allowed = {"emptyDir", "secret", "persistentVolumeClaim", "configMap", "image"}
        assert all(set(volume) - {"name"} <= allowed for volume in spec["volumes"])
        mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_both_roles_are_one_template() -> None:
    """With the same values a prefill worker is a decode worker but for its names."""
    documents = objects(rendered())
    texts = [str(named(documents, "Deployment", f"-{role}")).replace(role, "ROLE") for role in ("prefill", "decode")]
    assert texts[0] == texts[1]


def test_a_selector_is_filled_into_the_spread() -> None:
    for one in deployments(objects(rendered())):
        (spread,) = one["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert spread["labelSelector"] == one["spec"]["selector"]


def test_devices_are_requested_and_limited() -> None:
    example = next(path for path in EXAMPLES if path.stem == "rdma-values")
    for role in ("prefill", "decode"):
        spec = named(objects(rendered(example)), "Deployment", f"-{role}")["spec"]["template"]["spec"]
        for kind in ("requests", "limits"):
            resources = spec["containers"][0]["resources"][kind]
            assert (resources["nvidia.com/gpu"], resources["rdma/hca_shared_devices_a"]) == (1, 1)
        (shm,) = [volume for volume in spec["volumes"] if volume["name"] == "shm"]
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}


@EVERY_EXAMPLE
def test_a_worker_is_told_what_it_computes_on(example: Path) -> None:
    """What it requests: never the CPU where a GPU was meant, nor a GPU that the node shows to every pod."""
    documents = objects(rendered(example))
    for role in ("prefill", "decode"):
        (container,) = named(documents, "Deployment", f"-{role}")["spec"]["template"]["spec"]["containers"]
        requested = "nvidia.com/gpu" in container["resources"]["requests"]
        assert flags_of(container)["--device"] == ("cuda" if requested else "cpu")


def test_the_attention_is_that_of_both_pools() -> None:
    """Its name is part of what workers are paired by."""
    documents = objects(rendered(None, "engine.device=cuda", "engine.attention=triton"))
    for role in ("prefill", "decode"):
        (container,) = named(documents, "Deployment", f"-{role}")["spec"]["template"]["spec"]["containers"]
        assert flags_of(container)["--attention"] == "triton"


@EVERY_EXAMPLE
def test_a_rollout_is_not_given_up_while_pods_may_still_come(example: Path) -> None:
    """A new pod may wait for the old one's GPU, and a gateway is not ready before the workers' models are loaded."""
    specs = {one["metadata"]["name"].rpartition("-")[2]: one["spec"] for one in deployments(objects(rendered(example)))}
    starts = []
    for spec in specs.values():
        probe = spec["template"]["spec"]["containers"][0]["startupProbe"]
        starts.append(probe["periodSeconds"] * probe["failureThreshold"])
    for spec in specs.values():
        grace = spec["template"]["spec"]["terminationGracePeriodSeconds"]
        assert spec["progressDeadlineSeconds"] > max(starts) + grace


def test_names_of_workers_are_looked_up_as_they_stand() -> None:
    """Not below a pod's search domains first, of which the last may be one that answers for any name."""
    (container,) = named(objects(rendered()), "Deployment", "-gateway")["spec"]["template"]["spec"]["containers"]
    names = [text for text in container["args"] if text.startswith("--workers-dns=")]
    assert [name.rpartition(":")[0].endswith(".svc.cluster.local.") for name in names] == [True, True]


def test_an_image_can_hold_the_model() -> None:
    settings = ("model.source=image", "model.image.reference=registry.example/model:1", "model.path=weights")
    (_, spec), *_ = pod_specs(objects(rendered(None, *settings)))
    assert {"name": "model", "image": {"reference": "registry.example/model:1", "pullPolicy": "IfNotPresent"}} in spec[
        "volumes"
    ]
    assert flags_of(spec["containers"][0])["--model"] == "/model/weights"


@pytest.mark.parametrize(
    ("settings", "device"),
    [
        (["decode.gpu.count=1", "prefill.replicas=0", "engine.compute=fp8", "engine.dtype=float16"], "cuda"),
        (["engine.device=cuda", "engine.compute=native", "engine.kvDtype=bfloat16"], "cuda"),
        (["engine.device=cuda", "engine.dtype=float16", "engine.kvDtype=fp8_e4m3"], "cuda"),
        (["decode.gpu.count=1", "prefill.gpu.count=1", "engine.device=cpu", "engine.compute=exact"], "cpu"),
    ],
)
def test_what_devices_are_for(settings: list[str], device: str) -> None:
    """Prefill may be left out, and devices that aren't requested by a count (claims of resources) be named."""
    (container,) = named(objects(rendered(None, *settings)), "Deployment", "-decode")["spec"]["template"]["spec"][
        "containers"
    ]
    assert flags_of(container)["--device"] == device


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["engine.attention=fast"], "attention"),
        (["engine.attention=triton"], "engine.attention triton is for GPUs"),
        (["engine.device=cuda", "engine.attention=flash-attn-2"], "prefill.blockSize is 0: engine.attention"),
        (["apiKeys.secretName=keys"], "apiKeys.testSecret.name is empty"),
        ([*TLS, "tls.clientCertificates=true"], "tls.testSecret is empty"),
        (["ingress.enabled=true", "ingress.hosts[0]=a.b", "ingress.passthrough=true"], "passthrough needs tls.enabled"),
        (["decode.drainSeconds=30"], "decode.drainSeconds is 30: a drain must outlast the longest request"),
        (["longestGenerationSeconds=3600"], "drainSeconds"),
        (["prefill.replica=2"], "replica"),
        (["prefill.autoscaling.mode=vpa"], "mode"),
        (["prefill.autoscaling.mode=hpa"], "monitoring.rules.enabled"),
        (["prefill.autoscaling.mode=keda", "prefill.autoscaling.minReplicas=9"], "minReplicas is above maxReplicas"),
        (["prefill.rollout.maxSurge=0"], "can't both be 0"),
        (["tls.enabled=true"], "tls.secrets.gateway is empty"),
        (["tls.clientCertificates=true"], "needs tls.enabled"),
        (["model.source=hub"], "model.hub.repository is empty"),
        (["model.source=pvc"], "model.pvc.claimName is empty"),
        (["model.path=../etc"], "path"),
        (["route.enabled=true"], "route.parentRefs is empty"),
        (["ingress.enabled=true"], "ingress.hosts and ingress.tlsSecret"),
        (["monitoring.rules.ttftLimitSeconds=3"], "ttftLimitSeconds"),
        (["decode.topologySpreadConstraints[0].labelSelector.matchLabels.a=b"], "topologySpreadConstraints"),
        (["runAsUser=0"], "runAsUser"),
        (["prefill.gpu.count=8", "decode.gpu.count=8"], "prefill.gpu.count is 8: a worker computes on one GPU"),
        (["prefill.gpu.count=1"], "prefill.gpu.count and decode.gpu.count: one pool would compute on GPUs"),
        (["engine.compute=native"], "engine.compute native is none of device cpu"),
        (["engine.device=cuda", "engine.compute=exact"], "engine.compute exact is none of device cuda"),
        (["engine.dtype=float16"], "float16 is for GPUs"),
        (["engine.device=cuda", "engine.kvDtype=float16"], "engine.kvDtype float16: on GPUs it is int8, fp8_e4m3, or"),
    ],
)
@pytest.mark.parametrize("major", ["3", "4"])
def test_what_is_refused(settings: list[str], words: str, major: str) -> None:
    """Before anything reaches a cluster, with the value's name."""
    done = template(None, *settings, major=major)
    assert done.returncode != 0
    assert words in done.stderr


def test_old_clusters_are_refused() -> None:
    assert "kubeVersion" in template(None, kube="1.28").stderr
    settings = ("model.source=image", "model.image.reference=registry.example/model:1")
    assert "needs Kubernetes 1.33" in template(None, *settings, kube="1.29").stderr
