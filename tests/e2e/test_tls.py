"""`tandem up` with certificates and API keys: real processes, TLS everywhere, tenants apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from certificates import ROLES, Authority, Issued

from tandem.client import Client, GenerateResult
from tandem.errors import UnauthenticatedError, UnavailableError

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


def test_up_refuses_a_certificate_that_lacks_a_service(authority: Authority, start_stack: Any) -> None:
    """Before anything is started."""
    issued = authority.issue("two", "tandem-gateway", "tandem-decode")
    with pytest.raises(AssertionError, match=r"would be refused by peers: .*'tandem-prefill'"):
        start_stack.start(*issued.flags())
