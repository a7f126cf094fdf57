"""One rendering of the chart, with all that its pods need besides, up and ready."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from api_server import ApiServer
from chart_tools import NAMESPACE, RELEASE, named, objects, rendered
from pki import Pki
from pods import Pod

from kernels.build import cache_dir
from tandem.client import Client

COMPONENTS = ("prefill", "decode", "gateway")
SMALL: dict[str, Any] = {
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
MTLS: dict[str, Any] = {
    "tls": {
        "enabled": True,
        "secrets": {role: f"{role}-tls" for role in COMPONENTS},
        "clientCertificates": True,
        "testSecret": "client-tls",
    },
    "apiKeys": {"secretName": "keys", "testSecret": {"name": "test-key"}},
    "gateway": {**SMALL["gateway"], "discovery": "endpointslices"},
}


@dataclass
class Cluster:
    """The pods of one rendering: found by DNS and in clear, or, with `pki`, by EndpointSlices and with TLS."""

    documents: list[dict[str, Any]]
    pods: dict[str, Pod]
    test: Pod
    pki: Pki | None = None
    api: ApiServer | None = None
    client: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path, *, secure: bool) -> Cluster:
        """Nothing runs yet but the API server."""
        values = folder / "values.yaml"
        values.write_text(yaml.safe_dump({**SMALL, **(MTLS if secure else {})}))
        documents = objects(rendered(values))
        pki = Pki(folder / "pki") if secure else None
        pods, test = _pods(documents, folder, pki.secrets if pki else {})
        return cls(documents, pods, test, pki, ApiServer(folder) if secure else None, pki.client if pki else {})

    def start(self) -> None:
        """All pods, one after another as their probes say."""
        for role, pod in self.pods.items():
            if self.api is not None:
                pod.account, pod.given = self.api.account, self.api.environment
            if role != "gateway":
                _warm(pod)
            pod.start()
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            for role, pod in self.pods.items():
                if role == "gateway":
                    self.publish()
                pod.await_probe(probe)

    def close(self) -> None:
        """Leaves nothing behind."""
        for pod in self.pods.values():
            pod.kill()
        if self.api is not None:
            self.api.close()

    def another(self, role: str, folder: Path) -> Pod:
        """One more pod of a role, which no Service has yet."""
        pod = self[role]
        pod = replace(pod, name=f"{pod.name}-2", folder=folder, addresses={role: f"{pod.address}0"}, process=None)
        _warm(pod)
        return pod

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


def _warm(pod: Pod) -> None:
    """Its cache volume is that of a pod that has run here before: kernels are compiled."""
    shutil.copytree(cache_dir(), pod.mounts()["/cache"] / "tandem" / "kernels")


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
