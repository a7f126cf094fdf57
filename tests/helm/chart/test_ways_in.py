"""Who gets in, and how: NetworkPolicy, tokens, routes, Ingress, and the pod of `helm test`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chart_files import EXAMPLES
from chart_tools import RELEASE, named, objects, of_kind, pod_specs, rendered

EVERY_EXAMPLE = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


def documents_of(name: str) -> list[dict[str, Any]]:
    path: Path = next(path for path in EXAMPLES if path.stem == f"{name}-values")
    return objects(rendered(path))


@EVERY_EXAMPLE
def test_only_who_must_reaches_a_worker(example: Path) -> None:
    documents = objects(rendered(example))
    for component, other in (("prefill", "decode"), ("decode", "prefill")):
        policy = named(documents, "NetworkPolicy", f"-{component}")
        for rule in policy["spec"]["ingress"]:
            if {"port": "metrics"} in rule.get("ports", ()):
                continue
            callers = [peer["podSelector"]["matchLabels"] for peer in rule["from"]]
            assert {one["app.kubernetes.io/component"] for one in callers} <= {"gateway", other}
            assert all(one["app.kubernetes.io/instance"] == RELEASE for one in callers)


@EVERY_EXAMPLE
def test_a_token_is_mounted_only_for_watching(example: Path) -> None:
    documents = objects(rendered(example))
    roles = of_kind(documents, "Role")
    for name, spec in pod_specs(documents):
        watches = name.endswith("-gateway") and bool(roles)
        assert spec["automountServiceAccountToken"] is watches
    for role in roles:
        assert role["rules"] == [
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
        ]
    accounts = {one["metadata"]["name"] for one in of_kind(documents, "ServiceAccount")}
    assert {spec["serviceAccountName"] for _, spec in pod_specs(documents)} <= accounts


def test_an_ingress_that_hands_tls_on_asks_for_no_path_and_has_no_certificate() -> None:
    """Before the gateway has ended TLS nobody sees a path: a rule for one would be left out by the controller."""
    (ingress,) = of_kind(documents_of("mtls"), "Ingress")
    paths = [path for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]]
    assert [(path["path"], path["pathType"]) for path in paths] == [("/", "Prefix")]
    assert ingress["spec"]["tls"] == [{"hosts": ["llm.example"]}]


def test_an_ingress_that_ends_tls_has_the_api_alone() -> None:
    settings = ("ingress.enabled=true", "ingress.hosts[0]=llm.example", "ingress.tlsSecret=cert")
    (ingress,) = of_kind(objects(rendered(None, *settings)), "Ingress")
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    assert path["path"] == "/tandem.v1.InferenceService"
    assert ingress["spec"]["tls"] == [{"hosts": ["llm.example"], "secretName": "cert"}]


def test_streams_may_last_behind_an_http_route() -> None:
    """Implementations have limits of their own, some of seconds, where a route says nothing."""
    (route,) = of_kind(documents_of("hpa"), "HTTPRoute")
    assert [rule["timeouts"] for rule in route["spec"]["rules"]] == [{"request": "0s"}]
    (route,) = of_kind(documents_of("gpu"), "GRPCRoute")
    assert "timeouts" not in route["spec"]["rules"][0]


def test_the_log_of_the_test_can_be_read() -> None:
    """`helm test --logs` reads it after the test, when a pod that goes with its success is gone."""
    for pod in of_kind(documents_of("cpu-demo"), "Pod"):
        assert pod["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation"


def test_the_test_pod_is_a_client_and_no_service() -> None:
    """Whoever holds a service's certificate is that service."""
    documents = documents_of("mtls")
    secrets = {
        one["metadata"]["name"].rpartition("-")[2]: {
            volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume
        }
        for one in of_kind(documents, "Deployment", "Pod")
        for spec in [one["spec"] if one["kind"] == "Pod" else one["spec"]["template"]["spec"]]
    }
    assert secrets.pop("test") == {"tandem-client-tls"}
    assert "tandem-client-tls" not in set().union(*secrets.values())


def test_without_client_certificates_the_test_pod_gets_the_authority_alone() -> None:
    tls = [f"tls.secrets.{service}={service}-tls" for service in ("gateway", "prefill", "decode")]
    pod = named(objects(rendered(None, "tls.enabled=true", *tls)), "Pod", "-test")
    (source,) = [volume["secret"] for volume in pod["spec"]["volumes"] if "secret" in volume]
    assert source["items"] == [{"key": "ca.crt", "path": "ca.crt"}]


def test_the_test_pod_can_be_left_out() -> None:
    """By whom there is no key for."""
    assert of_kind(objects(rendered(None, "apiKeys.secretName=keys", "test.enabled=false")), "Pod") == []
