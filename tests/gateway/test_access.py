"""API keys and client certificates: who gets in, as which tenant, and what tenants see of each other."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, Issued
from gateway_fakes import Cluster, Front, expected, tokens_of

from gateway.access import Keys, certificate_tenant, read_keys
from gateway.tenants import cache_scope
from tandem.errors import ConfigError, TandemError, UnauthenticatedError
from tandem.service.peers import NOBODY, Peer
from tandem.service.status import from_rpc_error
from tandem.service.tls import Tls, TlsFiles, client_tls
from tandem.v1 import decode_pb2, inference_pb2

LOCAL, REMOTE = decode_pb2.PREFILL_SOURCE_LOCAL, decode_pb2.PREFILL_SOURCE_REMOTE
ALICE, BOB, EVE = "alice-key-0123456789", "bob-key-0123456789", "eve-key-0123456789"
METHODS = [method.name for method in inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods]


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def write(path: Path, **tenants: list[str]) -> Path:
    """Replaces the file of keys: hashes of these."""
    fresh = path.with_suffix(".new")
    fresh.touch(0o600)
    fresh.write_text(json.dumps({tenant: [digest(key) for key in keys] for tenant, keys in tenants.items()}))
    os.replace(fresh, path)
    return path


def spoil(path: Path) -> None:
    """Cuts the file's last character off."""
    path.write_text(path.read_text()[:-1])


def files(issued: Issued) -> TlsFiles:
    return TlsFiles(issued.cert, issued.key, issued.ca)


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return write(tmp_path / "keys.json", alice=[ALICE], bob=[BOB])


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def stream(front: Front, key: str | None, **options: Any) -> Any:
    """A GenerateStream call with a key."""
    tokens, prompt = options.pop("tokens", 2), options.pop("prompt", tuple(range(100, 164)))
    metadata = bearer(key) if key is not None else ()
    return front.stub.GenerateStream(front.request(tokens, prompt, **options), timeout=15, metadata=metadata)


async def refusal(call: Any) -> TandemError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if hasattr(call, "__await__") else call.read())
    return from_rpc_error(caught.value)


@pytest.mark.parametrize("method", METHODS)
async def test_every_method_needs_a_key(cluster: Cluster, serve: Any, keys_file: Path, method: str) -> None:
    """None, an unknown one, two, and what is no bearer's: all are UNAUTHENTICATED, and no worker hears of it."""
    await cluster.start()
    front = await serve(bindings={"api_keys": keys_file})
    kind = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods_by_name[method].input_type
    request = getattr(inference_pb2, kind.name)()
    bad = [(), bearer(EVE), bearer(ALICE) + bearer(ALICE), (("authorization", ALICE),), bearer(""), bearer("x" * 600)]
    for metadata in bad:
        call = getattr(front.stub, method)(request, timeout=10, metadata=metadata)
        assert isinstance(await refusal(call), UnauthenticatedError), metadata
    assert not cluster.decode[0].records


async def test_tenants_share_no_prefix_and_no_request_ids(cluster: Cluster, serve: Any, keys_file: Path) -> None:
    """The tenant is the key's: the same prompt is found again by its own tenant alone, and records say whose it is."""
    await cluster.start()
    front = await serve(bindings={"api_keys": keys_file})
    for key in (ALICE, BOB, ALICE, BOB):
        assert tokens_of(await front.collect(stream(front, key))) == expected(2)
    decode = cluster.decode[0]
    assert decode.sources == [REMOTE, REMOTE, LOCAL, LOCAL]
    assert [record.tenant for record in decode.records] == ["alice", "bob", "alice", "bob"]
    assert [record.cache_scope for record in decode.records] == [cache_scope("alice"), cache_scope("bob")] * 2
    assert {request.record.tenant for request in cluster.prefill[0].requests} == {"alice", "bob"}


async def test_request_ids_belong_to_their_tenant(cluster: Cluster, serve: Any, keys_file: Path) -> None:
    """Another tenant's id is free to use, and going on with "one's" stream doesn't end another's."""
    await cluster.start()
    front = await serve(bindings={"api_keys": keys_file})
    cluster.decode[0].stream_pause_after = 1
    first = stream(front, ALICE, tokens=3, request_id="same")
    assert (await first.read()).request_id == "same"
    assert "in use" in (await refusal(stream(front, ALICE, request_id="same"))).message
    resumed = stream(front, BOB, tokens=3, request_id="same", resume=inference_pb2.Resume())
    assert (await resumed.read()).request_id == "same"
    cluster.decode[0].resume.set()
    assert tokens_of(await front.collect(first)) == expected(3)
    assert tokens_of(await front.collect(resumed)) == expected(3)


async def test_keys_are_read_again(cluster: Cluster, serve: Any, keys_file: Path) -> None:
    """A new key works, a removed one doesn't, what runs goes on; a bad file changes nothing."""
    await cluster.start()
    cluster.decode[0].stream_pause_after = 1
    front = await serve(bindings={"api_keys": keys_file})
    running = stream(front, ALICE, tokens=3)
    assert (await running.read()).prompt.prompt_tokens == 64
    write(keys_file, eve=[EVE], bob=[BOB])
    cluster.decode[0].resume.set()
    assert tokens_of(await front.collect(stream(front, EVE))) == expected(2)
    assert (await refusal(stream(front, ALICE))).reason == "UNKNOWN_API_KEY"
    spoil(keys_file)
    assert tokens_of(await front.collect(stream(front, BOB))) == expected(2)
    assert tokens_of(await front.collect(running)) == expected(3)


async def test_no_key_is_logged(
    cluster: Cluster, serve: Any, keys_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither a good nor a bad one, nor a hash, in logs and answers; not even when a handler fails."""
    await cluster.start()
    front = await serve(bindings={"api_keys": keys_file})
    await front.collect(stream(front, ALICE))
    refused = await refusal(stream(front, EVE))
    spoil(keys_file)
    front.gateway.servicer._catalog = None
    failed = await refusal(stream(front, BOB))
    assert failed.reason == "INTERNAL"
    captured = capfd.readouterr()
    written = captured.out + captured.err + str(refused) + str(failed)
    assert "handler failed" in written
    assert "can't be renewed" in written
    for secret in (ALICE, BOB, EVE, digest(ALICE), digest(BOB), digest(EVE)):
        assert secret not in written


async def test_a_client_certificate_names_the_tenant(cluster: Cluster, serve: Any, authority: Authority) -> None:
    """Where certificates are required and no keys are. With keys, the key says who it is."""
    decode = authority.issue("d", "tandem-decode")
    worker = await cluster.add_decode(tls=Tls(files(decode), "tandem-decode"))
    bindings = {"tls": files(authority.issue("gateway", "tandem-gateway")), "client_certificates": True}
    for name in ("ann", "ben"):
        client = authority.issue(name, f"{name}.example")
        front = await serve(bindings=bindings, tls=client_tls(client.ca, client.cert, client.key))
        assert tokens_of(await front.collect(front.stream(tokens=2))) == expected(2)
    keys = write(client.cert.with_name("keys.json"), alice=[ALICE])
    front = await serve(bindings={**bindings, "api_keys": keys}, tls=client_tls(client.ca, client.cert, client.key))
    assert (await refusal(stream(front, None))).reason == "NO_API_KEY"
    assert tokens_of(await front.collect(stream(front, ALICE))) == expected(2)
    assert [record.tenant for record in worker.records] == ["cert:dns:ann.example", "cert:dns:ben.example", "alice"]


def test_certificate_tenants() -> None:
    """By the most specific name; nobody without a certificate or a name."""
    assert certificate_tenant(Peer(frozenset({"b", "a"}), ("spiffe://x/y",), "cn", "f")) == "cert:uri:spiffe://x/y"
    assert certificate_tenant(Peer(frozenset({"b", "a"}), (), "cn", "f")) == "cert:dns:a"
    assert certificate_tenant(Peer(uris=("a",), fingerprint="f")) == "cert:uri:a", "a URI is nobody's DNS name"
    assert certificate_tenant(Peer(common_name="cn", fingerprint="f")) == "cn:cn"
    assert certificate_tenant(Peer(uris=("",), common_name="cn", fingerprint="f")) == "cn:cn"
    for nobody in (NOBODY, Peer(fingerprint="f")):
        with pytest.raises(UnauthenticatedError):
            certificate_tenant(nobody)


def test_keys_find_their_tenant_alone() -> None:
    keys = Keys({"alice": [digest(ALICE), digest("second")], "bob": [digest(BOB)]})
    assert [keys.tenant_of(key.encode()) for key in (ALICE, "second", BOB, EVE, "")] == [
        "alice",
        "alice",
        "bob",
        None,
        None,
    ]
    assert keys.tenant_of(bytes.fromhex(digest(ALICE))) is None, "a hash is no key"


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.touch(0o600)
    path.write_text(f'alice = ["{digest(ALICE)}"]\n"bob.b" = []\n')
    assert read_keys(path).tenant_of(ALICE.encode()) == "alice"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "at least one tenant"),
        ("{}", "at least one tenant"),
        ('{"": []}', "a tenant's name"),
        ('{"cert:ann": []}', "a tenant's name"),
        ('{"a": "0"}', "tenant number 1 needs a list"),
        ('{"b": [], "a": ["0"]}', "tenant number 2 needs a list"),
        (f'{{"a": ["{digest("k").upper()}"]}}', "tenant number 1 needs a list"),
        (f'{{"a": ["{digest("k")}"], "b": ["{digest("k")}"]}}', "tenant number 2 has the same key as tenant number 1"),
        (f'{{"{digest("k")}": ["a"]}}', "tenant number 1 is named like a key"),
        (f'{{"b": [], "{digest("k").upper()}": []}}', "tenant number 2 is named like a key"),
        ('{"my-secret-key": ["alice"]}', "tenant number 1 needs a list"),
    ],
)
def test_bad_files_of_keys(tmp_path: Path, text: str, words: str) -> None:
    """Each is a ConfigError that names the flag and quotes no hash, and no name: it may be a key."""
    path = tmp_path / "keys.json"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_keys(path)
    assert str(caught.value).startswith("--api-keys: ")
    assert digest("k") not in str(caught.value).lower()
    assert "my-secret-key" not in str(caught.value)


def test_a_file_that_others_can_write_is_refused(keys_file: Path) -> None:
    keys_file.chmod(0o620)
    with pytest.raises(ConfigError, match="others can write"):
        read_keys(keys_file)
