"""`tandem up` with certificates and API keys: real processes, TLS everywhere, tenants apart."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from certificates import ROLES, Authority, Issued

from tandem.client import Client, GenerateResult
from tandem.errors import UnauthenticatedError, UnavailableError
from tandem.models import resolve_model

PROMPT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 6
MOVED = "tandem_nixl_bytes_transferred_total"
KEYS = {"alice": "alice-key-0123456789", "bob": "bob-key-0123456789"}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.touch(0o600)
    path.write_text(json.dumps({name: [hashlib.sha256(key.encode()).hexdigest()] for name, key in KEYS.items()}))
    return path


def ask(stack: Any, issued: Issued, tenant: str, **options: Any) -> GenerateResult:
    """A few greedy tokens for a tenant."""
    with Client(stack.gateway, timeout=60, api_key=KEYS[tenant], tls_ca=issued.ca) as client:
        return client.generate(PROMPT, temperature=0.0, max_tokens=4, ignore_eos=True, **options)


def check_kv_moves(stack: Any, issued: Issued, eventually: Any) -> None:
    """Each tenant's first request is computed by the prefill worker, and its KV comes to the decode worker."""
    moved, tokens = 0.0, set()
    for tenant in KEYS:
        first = ask(stack, issued, tenant)
        assert first.usage.cached_tokens == 0, "another tenant's prefix was found"
        eventually(lambda before=moved: stack.metric("decode", MOVED) > before)
        moved = stack.metric("decode", MOVED)
        tokens.add(first.token_ids)
    assert len(tokens) == 1
    assert ask(stack, issued, "alice").usage.cached_tokens > 0
    assert ask(stack, issued, "alice", cache_salt="apart").usage.cached_tokens == 0


def check_who_is_refused(stack: Any, issued: Issued) -> None:
    """No TLS, no key, an unknown key; and workers don't take clients."""
    with Client(stack.gateway, timeout=20) as clear, pytest.raises(UnavailableError):
        clear.models()
    for key in (None, "nobody's"):
        with (
            Client(stack.gateway, timeout=20, api_key=key, tls_ca=issued.ca) as client,
            pytest.raises(UnauthenticatedError),
        ):
            client.models()
    for worker in stack.status()["workers"]:
        assert worker["role"] == "gateway" or worker["load"]["total_blocks"] > 0
        if worker["role"] != "gateway":
            with Client(worker["address"], timeout=5, tls_ca=issued.ca) as client, pytest.raises(UnavailableError):
                client.models()


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_tls_and_tenants(
    start_stack: Any, eventually: Any, authority: Authority, all_roles: Issued, keys_file: Path, transport: str
) -> None:
    """KV goes from prefill to decode under mutual TLS; with grpc also after all certificates were renewed."""
    flags = [*all_roles.flags(), "--api-keys", str(keys_file), "--transport", transport, "--num-blocks", "256"]
    stack = start_stack.start(*flags, "--local-prefill-threshold", "0")
    try:
        check_kv_moves(stack, all_roles, eventually)
        check_who_is_refused(stack, all_roles)
        if transport == "grpc":
            authority.issue("tandem", *ROLES)
            stack.tandem("scale", "prefill", "2", "--gateway", stack.gateway, timeout=120)
            stack.tandem("scale", "prefill", "1", "--gateway", stack.gateway, timeout=120)
            before = stack.metric("decode", MOVED)
            ask(stack, all_roles, "bob", cache_salt="new")
            eventually(lambda: stack.metric("decode", MOVED) > before)
        for key in KEYS.values():
            assert key not in stack.log()
        assert stack.stop() == 0
    finally:
        stack.kill()


@contextmanager
def service(module: str, issued: Issued, log: Path, *flags: str) -> Iterator[dict[str, Any]]:
    """One process with a certificate of its own; gives what it says when it is ready."""
    command = [sys.executable, "-m", module, "--model", str(resolve_model("default")), *issued.flags(), *flags]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True)
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"{module} did not start: {log.read_text()[-2000:]}"
        yield json.loads(line)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()[-2000:]
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        print(f"stderr of {module}:\n{log.read_text()[-4000:]}")


def moved(metrics: str) -> float:
    """Bytes of KV that a worker counted."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(MOVED))


def test_three_services_with_a_certificate_each(authority: Authority, eventually: Any, tmp_path: Path) -> None:
    """Started one by one, as on three machines: each has its role's name alone, and clients need a certificate."""
    issued = {role.removeprefix("tandem-"): authority.issue(role, role) for role in ROLES}
    mine = authority.issue("me", "me.example")
    worker = ["--transport", "grpc", "--num-blocks", "256", "--drain-grace", "1"]
    with (
        service("decode_service", issued["decode"], tmp_path / "decode.log", *worker) as decode,
        service("prefill_service", issued["prefill"], tmp_path / "prefill.log", *worker) as prefill,
        service(
            "gateway",
            issued["gateway"],
            tmp_path / "gateway.log",
            *("--tls-client-auth", "required", "--local-prefill-threshold", "0"),
            *("--decode-worker", decode["address"], "--prefill-worker", prefill["address"]),
        ) as gateway,
        Client(gateway["address"], timeout=60, tls_ca=mine.ca, tls_cert=mine.cert, tls_key=mine.key) as client,
    ):
        eventually(lambda: [model.prefill_workers for model in client.models()] == [1])
        result = client.generate(PROMPT, temperature=0.0, max_tokens=4, ignore_eos=True)
        assert len(result.token_ids) == 4
        eventually(lambda: moved(decode["metrics"]) > 0)


def test_up_refuses_a_certificate_that_lacks_a_service(authority: Authority, start_stack: Any) -> None:
    """Before anything is started."""
    issued = authority.issue("two", "tandem-gateway", "tandem-decode")
    with pytest.raises(AssertionError, match=r"would be refused by peers: .*'tandem-prefill'"):
        start_stack.start(*issued.flags())
