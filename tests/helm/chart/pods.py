"""Pods of the rendered chart as processes on this machine, with exactly their commands, args, env and mounts.

What a cluster would give, and what stands for it here:

| in the cluster | here |
|---|---|
| a pod's address, and all its interfaces (0.0.0.0) | a loopback address of its own, so that ports stay as they are |
| a Service's DNS name | the address of its one pod |
| `python` of the image | the Python that runs the tests |
| a mounted folder | a temporary folder, by its path in args and env |
| a Secret | files and texts that the test gives |
| a service account's token, where one is mounted | a folder that the gateway is told of by one more flag |
| the API server | one that speaks its protocol of EndpointSlices (`api_server.py`) |
| the kubelet | this file: probes, preStop, SIGTERM, grace |

With TANDEM_IMAGE set they are containers of that image, run by podman (PODMAN: its command with flags) as the rendered
user, with no capability, a read-only root and the rendered limits; mounts, names and `python` are then as
rendered.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from volumes import put

ROOT = Path(__file__).resolve().parents[3]
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
KEPT = ("PATH", "LANG", "PYTHONDONTWRITEBYTECODE")
IMAGE = os.environ.get("TANDEM_IMAGE", "")
PODMAN = shlex.split(os.environ.get("PODMAN", "podman"))
BYTES = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def size(quantity: str) -> int:
    """Bytes of a quantity such as 4Gi."""
    found = re.fullmatch(r"(\d+)(\w*)", quantity)
    assert found is not None
    return int(found[1]) * BYTES[found[2]]


@dataclass
class Pod:
    """One pod with its one container, from its rendered spec."""

    name: str
    spec: Mapping[str, Any]
    addresses: Mapping[str, str]
    """Of each component; this pod's by its container's name."""
    folder: Path
    secrets: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    """Contents by Secret and key."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Addresses by the DNS names of Services."""
    account: Path | None = None
    """What the kubelet mounts where `automountServiceAccountToken` says so."""
    given: Mapping[str, str] = field(default_factory=dict)
    """Environment that the kubelet gives."""
    process: subprocess.Popen[str] | None = None

    @property
    def container(self) -> Mapping[str, Any]:
        """Its only one."""
        (container,) = self.spec["containers"]
        return container

    @property
    def address(self) -> str:
        """Its own; the test pod has none."""
        return self.addresses.get(self.container["name"], "")

    def port(self, name: str) -> int:
        """Of its container."""
        (found,) = (int(port["containerPort"]) for port in self.container["ports"] if port["name"] == name)
        return found

    @property
    def volumes(self) -> dict[str, Mapping[str, Any]]:
        """By name."""
        return {volume["name"]: volume for volume in self.spec["volumes"]}

    def mounts(self) -> dict[str, Path]:
        """Folders by mount path, made at the first call. /dev/shm and /tmp stay the machine's."""
        found = {}
        for mount in self.container["volumeMounts"]:
            if mount["mountPath"] in ("/dev/shm", "/tmp"):
                continue
            folder = self.folder / mount["name"]
            found[mount["mountPath"]] = folder
            if not folder.exists():
                folder.mkdir()
                self._fill(mount["name"])
        return found

    def renew(self) -> None:
        """What the kubelet does some time after Secrets have changed."""
        self.mounts()
        for mount in self.container["volumeMounts"]:
            self._fill(mount["name"])

    def _fill(self, volume: str) -> None:
        """With what its Secret holds now; other volumes begin empty."""
        if (source := self.volumes[volume].get("secret")) is None:
            return
        contents = self.secrets[source["secretName"]]
        chosen = {key: contents[key] for key in [item["key"] for item in source.get("items", ())] or contents}
        group = self.spec["securityContext"]["fsGroup"] if IMAGE else None
        put(self.folder / volume, chosen, source["defaultMode"], group)

    def here(self, text: str) -> str:
        """A rendered argument or value as it must be on this machine."""
        text = text.replace("0.0.0.0", self.address)
        if IMAGE:
            return text
        for name, address in self.names.items():
            text = text.replace(name, address)
        for path, folder in self.mounts().items():
            text = re.sub(rf"(^|=){re.escape(path)}(?=/|$)", rf"\g<1>{folder}", text)
        return text

    def command(self) -> list[str]:
        """What is started."""
        words = [*self.container["command"], *map(self.here, self.container.get("args", ()))]
        assert words[0] == "python"
        if IMAGE:
            return [*self._run(), *words]
        told = [f"--kubernetes-credentials={self.account}"] if self._has_token else []
        return [sys.executable, *words[1:], *told]

    @property
    def _has_token(self) -> bool:
        return bool(self.spec["automountServiceAccountToken"] and self.account)

    def _run(self) -> list[str]:
        """`podman run` up to the image, as the container's and the pod's security contexts say."""
        user, security = self.spec["securityContext"], self.container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert not security["allowPrivilegeEscalation"]
        flags = ["--rm", "--name", self.name, "--network", "host", "--read-only", "--read-only-tmpfs=false"]
        flags += ["--cap-drop", "all", "--security-opt", "no-new-privileges"]
        flags += ["--user", f"{user['runAsUser']}:{user['runAsGroup']}", "--tmpfs", "/tmp"]
        memory = size(self.container["resources"]["limits"]["memory"])
        flags += ["--memory", str(memory), "--memory-swap", str(memory)]
        if "shm" in self.volumes:
            flags += ["--shm-size", str(size(self.volumes["shm"]["emptyDir"]["sizeLimit"]))]
        flags += self._volume_flags(user)
        for name, value in self.environment().items():
            flags += ["--env", f"{name}={value}"]
        for name, address in self.names.items():
            flags += ["--add-host", f"{name}:{address}"]
        return [*PODMAN, "run", *flags, IMAGE]

    def _volume_flags(self, user: Mapping[str, Any]) -> list[str]:
        flags, read_only = [], {mount["mountPath"] for mount in self.container["volumeMounts"] if mount.get("readOnly")}
        for path, folder in self.mounts().items():
            if path not in read_only:
                for file in (folder, *folder.rglob("*")):
                    shutil.chown(file, user["runAsUser"], user["fsGroup"])
            flags += ["--volume", f"{folder}:{path}{':ro' if path in read_only else ''}"]
        return flags + (["--volume", f"{self.account}:{ACCOUNT}:ro"] if self._has_token else [])

    def execute(self, *words: str) -> str:
        """What a command inside the container writes; for containers alone."""
        command = [*PODMAN, "exec", self.name, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    def environment(self) -> dict[str, str]:
        """The container's, and of this machine's only what processes can't be without."""
        kept = dict(self.given)
        if not IMAGE:
            kept |= {name: os.environ[name] for name in KEPT if name in os.environ}
        for variable in self.container["env"]:
            if "value" in variable:
                kept[variable["name"]] = self.here(variable["value"])
            else:
                reference = variable["valueFrom"]["secretKeyRef"]
                kept[variable["name"]] = self.secrets[reference["name"]][reference["key"]].decode()
        return kept

    def start(self) -> None:
        """Runs the container's command; its output goes to a file of its folder."""
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                self.command(), env=self._around(), cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def run(self) -> subprocess.CompletedProcess[str]:
        """Runs the container's command to its end, as a pod that isn't started again."""
        return subprocess.run(
            self.command(), env=self._around(), cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )

    def _around(self) -> dict[str, str] | None:
        """Podman hands the container's environment over itself."""
        return None if IMAGE else self.environment()

    def log(self) -> str:
        """What it wrote."""
        return (self.folder / "log").read_text("utf-8")

    def probe(self, name: str) -> bool:
        """One look, as the kubelet takes it: gRPC health over a plain connection, within the probe's timeout."""
        probe = self.container[name]
        question = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
        with grpc.insecure_channel(f"{self.address}:{probe['grpc']['port']}") as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(question, timeout=probe["timeoutSeconds"])
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def await_probe(self, name: str, seconds: float = 600 if IMAGE else 120) -> None:
        """Probes until it passes; within the time that the probe itself would give, and no longer than `seconds`: in a
        container kernels may have to be compiled first.
        """
        probe = self.container[name]
        limit = min(seconds, probe["periodSeconds"] * probe["failureThreshold"]) if name == "startupProbe" else seconds
        self.until(lambda: self.probe(name), limit)

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Raises AssertionError with the log when it takes too long or the process ends."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process is not None
            assert self.process.poll() is None, f"{self.name} has ended: {self.log()}"
            assert time.monotonic() < end, f"{self.name}: waited in vain: {self.log()[-2000:]}"
            time.sleep(0.1)

    def terminate(self) -> None:
        """preStop, then SIGTERM, as the kubelet does; the kill at the end of the grace is `await_end`'s."""
        assert self.process is not None
        hook = list(map(self.here, self.container["lifecycle"]["preStop"]["exec"]["command"]))
        if IMAGE:
            hook = [*PODMAN, "exec", self.name, *hook]
        subprocess.run(hook, check=True, timeout=self.spec["terminationGracePeriodSeconds"])
        self.process.send_signal(signal.SIGTERM)

    def await_end(self, seconds: float | None = None) -> int:
        """The exit code. Raises TimeoutExpired when the grace, or `seconds`, are over."""
        assert self.process is not None
        return self.process.wait(seconds or self.spec["terminationGracePeriodSeconds"])

    def kill(self) -> None:
        """Leaves nothing behind."""
        if self.process is not None and self.process.poll() is None:
            if IMAGE:
                subprocess.run([*PODMAN, "rm", "-f", self.name], check=False, capture_output=True)
            self.process.kill()
            self.process.wait()
