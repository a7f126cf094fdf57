"""Fixtures that several rooms share: a running Tandem of real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when first imported, by whichever test

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

_HERE = str(Path(__file__).parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from certificates import ROLES, Authority, Issued  # noqa: E402

READY_SECONDS = 120


@dataclass
class Stack:
    """One `tandem up` with its processes. `gateway` and `http` are HOST:PORT once it is ready."""

    process: subprocess.Popen[str]
    log_path: Path
    gateway: str = ""
    http: str = ""
    lines: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, *flags: str, env: dict[str, str] | None = None) -> Stack:
        """Starts `tandem up` on free ports with `flags` and waits until it says ready."""
        log = tempfile.NamedTemporaryFile("w", prefix="tandem-e2e-", suffix=".log", delete=False)  # noqa: SIM115
        command = [sys.executable, "-m", "tandem.cli", "up", "--gateway", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        command += flags
        with log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, **(env or {})},
            )
        stack = cls(process, Path(log.name))
        try:
            stack._await_ready()
        except BaseException:
            stack.kill()
            raise
        threading.Thread(target=stack._drain_stdout, daemon=True).start()
        return stack

    def _await_ready(self) -> None:
        assert self.process.stdout is not None
        watchdog = threading.Timer(READY_SECONDS, self.process.kill)
        watchdog.start()
        try:
            for line in self.process.stdout:
                self.lines.append(line.rstrip("\n"))
                if line.startswith("ready "):
                    fields = dict(part.split("=", 1) for part in line.split()[1:])
                    self.gateway, self.http = fields["gateway"], fields["http"]
                    return
        finally:
            watchdog.cancel()
        raise AssertionError(f"tandem up never became ready (exit {self.process.wait()}):\n{self.log()[-4000:]}")

    def _drain_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def log(self) -> str:
        """What it wrote to stderr so far."""
        return self.log_path.read_text(errors="replace")

    def children(self, word: str = "") -> list[psutil.Process]:
        """Processes of its session whose command line holds `word`."""
        return [process for process in session_processes(self.process.pid) if word in " ".join(command_line(process))]

    def tandem(self, *arguments: str, timeout: float = 60, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs another tandem command."""
        command = [sys.executable, "-m", "tandem.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0 or not check, f"tandem {' '.join(arguments)}: exit {done.returncode}\n{done.stderr}"
        return done

    def generate(self, prompt: str, *flags: str) -> dict[str, object]:
        """`tandem generate --json` against this stack."""
        result = self.tandem("generate", prompt, "--gateway", self.gateway, "--json", *flags)
        return dict(json.loads(result.stdout))

    def status(self) -> dict[str, Any]:
        """`tandem status --json`."""
        return dict(json.loads(self.tandem("status", "--gateway", self.gateway, "--json").stdout))

    def metric(self, role: str, name: str) -> float:
        """Sum of one metric over all workers of a role, or over the gateway."""
        addresses = (
            [self.http] if role == "gateway" else [w["metrics"] for w in self.status()["workers"] if w["role"] == role]
        )
        return sum(scrape(address, name) for address in addresses)

    def stop(self, signum: int = signal.SIGINT, timeout: float = 60) -> int:
        """Asks it to stop; returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            return self.process.wait(timeout)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kills what is left of its session; moves its log to this test's output, which pytest shows for failures."""
        for process in session_processes(self.process.pid):
            process.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self.log_path.exists():
            print(f"stderr of tandem up {self.process.pid}:\n{self.log()[-8000:]}")
            self.log_path.unlink()


def scrape(address: str, name: str) -> float:
    """Sum of a metric's samples at one /metrics endpoint; 0 when it has none yet."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    )


def command_line(process: psutil.Process) -> list[str]:
    """A process's command line; empty when it is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def session_processes(session: int) -> list[psutil.Process]:
    """Live processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def wait_until(condition: object, timeout: float = 30.0, interval: float = 0.05) -> None:
    """Polls until `condition()` is true; fails after `timeout` seconds."""
    assert callable(condition)
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"condition not met within {timeout} s: {condition}")
        time.sleep(interval)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make exact` runs the whole matrix."""
    parser.addoption(
        "--exact-full", action="store_true", help="run every way of tests/exact, not the pairwise selection"
    )
    parser.addoption("--model-deep", action="store_true", help="explore the larger worlds of tests/model too")
    parser.addoption(
        "--scaling-rounds", type=int, default=1, help="how often tests/e2e/test_scaling.py grows and shrinks both pools"
    )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Issues certificates for the test."""
    return Authority(tmp_path)


@pytest.fixture
def all_roles(authority: Authority) -> Issued:
    """One certificate with the names of all services, as `tandem up` needs it."""
    return authority.issue("tandem", *ROLES)


@pytest.fixture(scope="session")
def shared_stack() -> Iterator[Stack]:
    """One prefill and one decode worker with default flags, for tests that leave it as they found it."""
    stack = Stack.start()
    yield stack
    assert stack.stop() == 0


@pytest.fixture(scope="session")
def start_stack() -> type[Stack]:
    """The class itself, for tests that need flags of their own."""
    return Stack


@pytest.fixture(scope="session")
def eventually() -> object:
    """`wait_until`, as a fixture since tests import nothing from each other."""
    return wait_until
