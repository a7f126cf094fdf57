"""Every object of every example against its schema: Kubernetes' own, custom resources, and the rules of checkov."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_files import EXAMPLES, ROOT
from chart_tools import TOOLS, VERSIONS, objects, rendered, run

CUSTOM = {"ScaledObject", "PodMonitor", "PrometheusRule"}
ROUTES = {"GRPCRoute", "HTTPRoute"}
OWN_GROUPS = {"", "apps", "autoscaling", "networking.k8s.io", "policy", "rbac.authorization.k8s.io"}
HERE = Path(__file__).parent

SKIPPED_CHECKS = {
    "CKV_K8S_11": "a CPU limit throttles a step in its middle; requests share the CPU out",
    "CKV_K8S_15": "the tag is a version, and image.digest pins what it names: pulling each time adds a way to fail",
    "CKV_K8S_43": "image.digest is there for who has one; examples name versions",
    "CKV_K8S_38": "the token is the gateway's own, to watch EndpointSlices, and only where that is chosen",
    "CKV_K8S_35": "the hub's client and the test pod's take their token from the environment alone",
    "CKV_K8S_8": "the test pod ends by itself; whatever serves has all three probes",
    "CKV_K8S_9": "as above",
    "CKV2_K8S_6": "each pod that serves has a NetworkPolicy; the test pod, which serves nothing, has none",
}


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All examples together, by Kubernetes' version; names that would come twice are of releases of their own."""
    folder = tmp_path_factory.mktemp("manifests")
    found = {}
    for version in VERSIONS:
        found[version] = folder / f"{version}.yaml"
        texts = (rendered(example, kube=version, release=f"r{number}") for number, example in enumerate(EXAMPLES))
        found[version].write_text("\n---\n".join(texts))
    return found


def _write(path: Path, documents: list[dict[str, Any]]) -> Path:
    path.write_text(yaml.safe_dump_all(documents))
    return path


def _own(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in documents if one["apiVersion"].rpartition("/")[0] in OWN_GROUPS]


def test_no_kind_goes_unvalidated(manifests: dict[str, Path]) -> None:
    """What is neither Kubernetes' own nor known to a validator would pass unseen."""
    documents = objects(manifests["1.33"].read_text())
    others = {one["kind"] for one in documents} - {one["kind"] for one in _own(documents)}
    assert others == CUSTOM | ROUTES


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_its_own_kinds(manifests: dict[str, Path], tmp_path: Path, version: str) -> None:
    own = _own(objects(manifests[version].read_text()))
    file = _write(tmp_path / "own.yaml", own)
    done = run(TOOLS / "validate" / "bin" / "kubernetes-validate", "--strict", "-k", version, file)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    # A kind that it doesn't know it only warns of.
    assert told.count(" passed for resource ") == len(own), told


def test_custom_resources_fit_their_definitions(manifests: dict[str, Path], tmp_path: Path) -> None:
    custom = [one for one in objects(manifests["1.33"].read_text()) if one["kind"] in CUSTOM]
    file = _write(tmp_path / "custom.yaml", custom)
    done = run(TOOLS / "validate" / "bin" / "python", HERE / "validate_crds.py", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok ") == len(custom) >= 6


def test_routes_fit_their_definitions(manifests: dict[str, Path]) -> None:
    """Values by the definition's schema, keys, which that leaves open, by its types."""
    routes = [one for one in objects(manifests["1.33"].read_text()) if one["kind"] in ROUTES]
    assert {one["kind"] for one in routes} == ROUTES
    module = "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1"
    typed = [f'import type * as v1 from "{module}";']
    typed += [f"export const r{i}: v1.I{one['kind']} = {json.dumps(one)};" for i, one in enumerate(routes)]
    valued = [f'import * as v1 from "{module}";']
    valued += [f"new v1.{one['kind']}({json.dumps(one)}).validate();" for one in routes]
    (TOOLS / "routes.ts").write_text("\n".join(typed))
    (TOOLS / "routes.mjs").write_text("\n".join(valued))
    flags = ("--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "--skipLibCheck")
    compiled = run("node", TOOLS / "node_modules/typescript/bin/tsc", *flags, TOOLS / "routes.ts")
    assert compiled.returncode == 0, compiled.stdout
    checked = run("node", TOOLS / "routes.mjs")
    assert checked.returncode == 0, checked.stderr


def _checkov(framework: str, file: Path, skipped: dict[str, str]) -> Any:
    done = run(
        TOOLS / "checkov" / "bin" / "checkov",
        *("-f", file, "--framework", framework, "--compact", "--quiet", "-o", "json", "--skip-download"),
        *(["--skip-check", ",".join(skipped)] if skipped else []),
    )
    report = json.loads(done.stdout)
    return report[0] if isinstance(report, list) else report


def test_checkov_finds_nothing_but_what_is_reasoned(manifests: dict[str, Path]) -> None:
    report = _checkov("kubernetes", manifests["1.33"], SKIPPED_CHECKS)
    failed = {
        (check["check_id"], check["check_name"], check["resource"]) for check in report["results"]["failed_checks"]
    }
    assert failed == set()
    assert report["summary"]["passed"] > 500


def test_every_skipped_check_would_find_something(manifests: dict[str, Path]) -> None:
    """A reason that has become needless is taken out."""
    report = _checkov("kubernetes", manifests["1.33"], {})
    assert {check["check_id"] for check in report["results"]["failed_checks"]} == set(SKIPPED_CHECKS)


def test_the_dockerfile_is_clean() -> None:
    """checkov's rules of a Dockerfile; health is asked for by the cluster's probes."""
    skipped = {
        "CKV_DOCKER_2": "the cluster's probes ask for health",
        "CKV_DOCKER_7": "the base is an argument, whose default has a version",
    }
    report = _checkov("dockerfile", ROOT / "Dockerfile", skipped)
    assert [check["check_id"] for check in report["results"]["failed_checks"]] == []
    assert report["summary"]["passed"] > 0
