"""What is chosen before grpc is loaded, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from tandem.service import polling

CHOSEN = ",".join(f"-{name}" for name in polling.EXPERIMENTS)
KNOWN = version("grpcio").startswith(polling.VERSIONS)


def chosen(code: str, variable: str | None = None) -> str:
    """What a new process has in the variable after `code`."""
    environment = {name: value for name, value in os.environ.items() if name != polling.VARIABLE}
    if variable is not None:
        environment[polling.VARIABLE] = variable
    show = f"{code}; import os; print(os.environ.get({polling.VARIABLE!r}, 'unset'))"
    done = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
    assert not done.stderr, "gRPC says so when it doesn't know an experiment"
    return done.stdout.strip()


@pytest.mark.skipif(not KNOWN, reason="another version of gRPC is installed")
@pytest.mark.parametrize("package", ["gateway", "prefill_service", "decode_service", "bench"])
def test_processes_choose_before_grpc_is_loaded(package: str) -> None:
    loaded = f"import sys, {package}; assert 'grpc' not in sys.modules; import grpc"
    assert chosen(loaded) == CHOSEN


def test_who_has_chosen_keeps_it() -> None:
    assert chosen("import gateway", "event_engine_fork") == "event_engine_fork"


def test_it_is_too_late_once_grpc_is_loaded() -> None:
    assert chosen("import grpc, gateway") == "unset"


def test_the_client_library_leaves_its_user_s_process_alone() -> None:
    assert chosen("import tandem.client") == "unset"


def test_other_versions_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling, "version", lambda name: "1.999.0")
    monkeypatch.delenv(polling.VARIABLE, raising=False)
    monkeypatch.delitem(sys.modules, "grpc", raising=False)
    polling.read_where_python_waits()
    assert polling.VARIABLE not in os.environ
