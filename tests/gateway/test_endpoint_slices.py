"""Workers from EndpointSlices: what a slice says, and the watch against a server that speaks the real protocol."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_kubernetes import FakeKubernetes
from gateway_fakes import Heard, until

from gateway.discovery import kubernetes
from gateway.discovery.endpoint_slices import EndpointSlices, Selection, selector_of
from gateway.discovery.kubernetes import Api
from gateway.discovery.slices import addresses_of
from gateway.discovery.source import Addresses
from tandem.errors import ConfigError


def endpoint(*hosts: str, uid: str = "", **conditions: bool | None) -> dict[str, Any]:
    return {
        "addresses": list(hosts),
        "conditions": conditions,
        **({"targetRef": {"kind": "Pod", "uid": uid}} if uid else {}),
    }


def piece(*endpoints: dict[str, Any], family: str = "IPv4", port: int = 7001, name: str = "grpc") -> dict[str, Any]:
    return {"addressType": family, "ports": [{"name": name, "port": port}], "endpoints": list(endpoints)}


@pytest.mark.parametrize(
    ("conditions", "listed"),
    [
        ({}, True),
        ({"ready": None}, True),
        ({"ready": True, "serving": True, "terminating": False}, True),
        ({"ready": False, "serving": False}, False),
        ({"ready": False, "serving": True, "terminating": True}, False),
        ({"ready": True, "serving": True, "terminating": True}, False),
        ({"ready": True, "serving": False}, False),
    ],
)
def test_only_endpoints_that_take_new_work(conditions: dict[str, bool | None], listed: bool) -> None:
    assert bool(addresses_of([piece(endpoint("10.0.0.1", **conditions))], "grpc")) is listed


def test_slices_are_merged_and_each_pod_is_one_worker() -> None:
    six = piece(endpoint("fd00::1", uid="a"), endpoint("fd00::3", uid="c"), family="IPv6")
    four = piece(endpoint("10.0.0.1", uid="a"), endpoint("10.0.0.2", "10.9.9.9", uid="b"))
    moved = piece(endpoint("10.0.0.2", uid="b"), {"addresses": None}, endpoint("10.0.0.4"))
    names = piece(endpoint("pod.example"), family="FQDN")
    found = addresses_of([six, four, moved, names], "grpc")
    assert found == ("10.0.0.1:7001", "10.0.0.2:7001", "10.0.0.4:7001", "[fd00::3]:7001")


def test_the_named_port_or_the_only_one() -> None:
    assert addresses_of([piece(endpoint("10.0.0.1"), port=1, name="other")], "grpc") == ("10.0.0.1:1",)
    several = {**piece(endpoint("10.0.0.1")), "ports": [{"name": "metrics", "port": 1}, {"name": "grpc", "port": 2}]}
    assert addresses_of([several], "grpc") == ("10.0.0.1:2",)
    assert addresses_of([several], "nothing") == ()
    assert addresses_of([{"addressType": "IPv4", "ports": None, "endpoints": None}], "grpc") == ()


def test_a_bare_name_selects_the_slices_of_that_service() -> None:
    assert selector_of(" tandem-decode ") == "kubernetes.io/service-name=tandem-decode"
    assert selector_of("app=x,role in (a,b)") == "app=x,role in (a,b)"
    assert selector_of("!canary") == "!canary"


@pytest.fixture
async def api() -> AsyncIterator[FakeKubernetes]:
    fake = FakeKubernetes()
    await fake.start()
    yield fake
    await fake.close()


def source_at(fake: FakeKubernetes, api: Api | None = None) -> EndpointSlices:
    api = api or Api("127.0.0.1", fake.port, False, Path("/nonexistent"))
    selectors: Any = {"prefill": selector_of("p"), "decode": selector_of("d")}
    return EndpointSlices(api, Selection("models", selectors), first_pause=0.01)


@asynccontextmanager
async def following(api: FakeKubernetes) -> AsyncIterator[Heard]:
    """Reports of a source that has listed one decode worker."""
    api.put("d-1", "d", endpoint("10.0.0.1", ready=True))
    heard, source = Heard(), source_at(api)
    source.start(heard)
    try:
        await until(lambda: heard.last.decode == ("10.0.0.1:7001",))
        yield heard
    finally:
        await source.close()


@pytest.fixture
async def heard(api: FakeKubernetes) -> AsyncIterator[Heard]:
    async with following(api) as heard:
        yield heard


def watches(fake: FakeKubernetes, service: str = "d") -> list[dict[str, str]]:
    return [r for r in fake.requests if "watch" in r and r["labelSelector"].endswith(f"={service}")]


async def test_lists_then_watches_each_role(api: FakeKubernetes, heard: Heard) -> None:
    """Pods come, get ready, drain and go, and a slice goes with all that is in it."""
    assert {r["path"] for r in api.requests} == {"/apis/discovery.k8s.io/v1/namespaces/models/endpointslices"}
    api.put("p-1", "p", endpoint("10.0.1.1", ready=False))
    api.put("p-1", "p", endpoint("10.0.1.1", ready=True))
    api.put("d-2", "d", endpoint("10.0.0.2", ready=True))
    api.put("x-1", "another-release", endpoint("10.0.9.9", ready=True))
    await until(lambda: heard.last == Addresses(("10.0.1.1:7001",), ("10.0.0.1:7001", "10.0.0.2:7001")))
    api.put("d-1", "d", endpoint("10.0.0.1", ready=False, serving=True, terminating=True))
    await until(lambda: heard.last.decode == ("10.0.0.2:7001",))
    api.delete("d-2")
    await until(lambda: heard.last == Addresses(("10.0.1.1:7001",), ()))
    assert heard.troubles == []


async def test_a_watch_that_ends_goes_on_from_its_last_version(api: FakeKubernetes) -> None:
    """From a bookmark too: nothing is listed again, and nothing that happened between two watches is lost."""
    api.watch_seconds = 1.2
    async with following(api) as heard:
        await until(lambda: len(watches(api)) == 1)
        api.bookmark()
        marked = str(api.version)
        await until(lambda: len(watches(api)) >= 3)
        assert watches(api)[-1]["resourceVersion"] == marked
        api.put("d-1", "d", endpoint("10.0.0.7", ready=True))
        await until(lambda: heard.last.decode == ("10.0.0.7:7001",))
        assert sum("watch" not in r and r["labelSelector"].endswith("=d") for r in api.requests) == 1
        assert heard.troubles == []


@pytest.mark.parametrize("fault", ["expired", "expired-event"])
async def test_a_version_that_is_gone_is_listed_anew(api: FakeKubernetes, fault: str) -> None:
    """As a status and as an event: what changed meanwhile, deletions too, comes with the list."""
    api.put("d-1", "d", endpoint("10.0.0.1"))
    api.put("d-2", "d", endpoint("10.0.0.2"))
    heard, source = Heard(), source_at(api)
    source.start(heard)
    await until(lambda: len(heard.last.decode) == 2)
    await until(lambda: len(watches(api)) == 1 == len(watches(api, "p")))
    del api.slices["d-1"]  # without an event: it was missed
    api.faults = [fault] * 2
    await api.hang_up()
    await until(lambda: heard.last.decode == ("10.0.0.2:7001",))
    await source.close()


@pytest.mark.parametrize("fault", ["junk", "cut", "refuse", "end"])
async def test_what_was_known_stays_in_trouble(api: FakeKubernetes, heard: Heard, fault: str) -> None:
    """Bad JSON, a broken connection, a refusal, watches that end at once: told, and got over."""
    await until(lambda: len(watches(api)) == 1 == len(watches(api, "p")))
    api.faults = [fault] * 6
    await api.hang_up()
    await until(lambda: not api.faults)
    assert heard.last.decode == ("10.0.0.1:7001",)
    assert heard.troubles
    api.put("d-1", "d", endpoint("10.0.0.3"))
    await until(lambda: heard.last.decode == ("10.0.0.3:7001",))


async def test_a_watch_that_says_nothing_more_is_broken_off(
    api: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something between here and the server hangs: the connection is there, but no event and no end comes."""
    monkeypatch.setattr(kubernetes, "WATCH_SECONDS", 0)
    monkeypatch.setattr(kubernetes, "LATE_SECONDS", 0.3)
    api.faults = ["", "", "hang", "hang"]  # two lists, then their watches
    async with following(api) as heard:
        await until(lambda: not api.faults)
        api.put("d-1", "d", endpoint("10.0.0.2"))
        await until(lambda: heard.last.decode == ("10.0.0.2:7001",))
        await until(lambda: "a watch did not end in time" in heard.troubles)


async def test_a_server_that_is_away_is_asked_until_it_is_back(api: FakeKubernetes, heard: Heard) -> None:
    port = api.port
    await api.close()
    with socket.socket() as kept:  # or a connection of somebody's might take the port meanwhile
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", port))
        await until(lambda: any("Connect" in text or "refused" in text for text in heard.troubles))
        assert heard.last.decode == ("10.0.0.1:7001",)
        again = FakeKubernetes()
        again.version = api.version
        again.put("d-9", "d", endpoint("10.0.0.9"))
        await again.start(port=port)
    await until(lambda: heard.last.decode == ("10.0.0.9:7001",))
    await again.close()


async def test_the_token_is_read_again_and_the_server_is_checked(authority: Any, tmp_path: Path) -> None:
    """A renewed token is in the next request; a server of another authority gets none."""
    issued = authority.issue("api", "kubernetes.default")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(issued.cert, issued.key)
    (tmp_path / "ca.crt").write_bytes(issued.ca.read_bytes())
    (tmp_path / "token").write_text("old\n")
    fake = FakeKubernetes()
    fake.tokens = {"old"}
    fake.put("d-1", "d", endpoint("10.0.0.1"))
    await fake.start(tls)
    source, heard = source_at(fake, Api.find(f"https://127.0.0.1:{fake.port}", tmp_path)), Heard()
    source.start(heard)
    try:
        await until(lambda: heard.last.decode == ("10.0.0.1:7001",))
        fake.tokens = {"new"}
        fake.put("d-1", "d", endpoint("10.0.0.2"))
        await fake.hang_up()
        await until(lambda: "401: Unauthorized" in heard.troubles)
        (tmp_path / "token").write_text("new")
        fake.put("d-1", "d", endpoint("10.0.0.3"))
        await until(lambda: heard.last.decode == ("10.0.0.3:7001",))
        await until(
            lambda: fake.connections == 2
        )  # one a role: none that was begun under the old authority is on its way
        (tmp_path / "ca.crt").write_bytes(type(authority)(tmp_path, "other").ca.read_bytes())
        await fake.hang_up()
        seen = len(fake.requests)
        await until(lambda: any("CERTIFICATE_VERIFY_FAILED" in text for text in heard.troubles))
        assert len(fake.requests) == seen
    finally:
        await source.close()
        await fake.close()


def test_where_the_server_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the pod's environment; what can't work is said at start."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="no pod"):
        Api.find("", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    with pytest.raises(ConfigError, match="token can't be read"):
        Api.find("", tmp_path)
    for bad in ("ftp://x", "https://x:99999", "https://x/path", "x:1"):
        with pytest.raises(ConfigError, match="--kubernetes-api"):
            Api.find(bad, tmp_path)
    assert Api.find("http://[::1]:8001", tmp_path) == Api("::1", 8001, False, tmp_path)
