"""Certificates of services: what is refused at start, who gets in, and renewal while streams run."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, Issued
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.errors import ConfigError, PermissionDeniedError, TandemError
from tandem.service.channel import open_channel, open_service_channel
from tandem.service.peers import NOBODY, callers, peer_of
from tandem.service.server import ServerShell
from tandem.service.status import from_rpc_error
from tandem.service.tls import ROLE_NAMES, ChannelTls, Tls, TlsFiles, client_tls, tls_files
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc as pb_grpc

SERVICE = "tandem.v1.InferenceService"


def made(issued: Issued, role: str) -> Tls:
    return Tls(TlsFiles(issued.cert, issued.key, issued.ca), ROLE_NAMES[role])


class Telling(pb_grpc.InferenceServiceServicer):
    """Says who calls; streams for as long as it is asked to."""

    def __init__(self) -> None:
        self.more = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> pb.GenerateResponse:
        peer = peer_of(context)
        return pb.GenerateResponse(request_id=peer.fingerprint, model=",".join([peer.common_name, *peer.uris]))

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield pb.GenerateStreamResponse(request_id="first")
        await self.more.wait()
        yield pb.GenerateStreamResponse(request_id="last")


@asynccontextmanager
async def serving(tls: Tls | None, **options: Any) -> AsyncIterator[tuple[Telling, str]]:
    """A decode worker's shell; its InferenceService is for gateways."""
    servicer = Telling()
    shell = ServerShell("decode", "127.0.0.1:0", tls=tls, admit=callers({SERVICE: "tandem-gateway"}), **options)
    pb_grpc.add_InferenceServiceServicer_to_server(servicer, shell.server)
    shell.add_service(SERVICE)
    address = await shell.start()
    shell.set_serving(True)
    try:
        yield servicer, address
    finally:
        await shell.server.stop(0)


async def ask(channel: grpc.aio.Channel) -> Any:
    """Generate over a channel that is closed then. Raises TandemErrors."""
    async with channel:
        try:
            return await pb_grpc.InferenceServiceStub(channel).Generate(pb.GenerateRequest(), timeout=10)
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc) from exc


def fingerprint(cert: Path) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(cert.read_text())).hexdigest()


async def test_the_right_role_gets_in_and_is_known(authority: Authority) -> None:
    server = made(authority.issue("d", "tandem-decode"), "decode")
    issued = authority.issue("g", "tandem-gateway", uris=("spiffe://here/g",))
    async with serving(server) as (_, address):
        answer = await ask(open_service_channel(address, "decode", made(issued, "gateway")))
    assert (answer.request_id, answer.model) == (fingerprint(issued.cert), "g,spiffe://here/g")


async def test_another_role_is_denied_but_may_ask_for_health(authority: Authority) -> None:
    """Names count as DNS names alone: the same text elsewhere in the certificate opens nothing."""
    server = made(authority.issue("d", "tandem-decode"), "decode")
    issued = authority.issue("tandem-gateway", "tandem-prefill", "other", uris=("tandem-gateway",))
    caller = made(issued, "prefill")
    async with serving(server) as (_, address):
        with pytest.raises(PermissionDeniedError, match=r"DNS name tandem-gateway.*this one has other, tandem-prefill"):
            await ask(open_service_channel(address, "decode", caller))
        async with open_service_channel(address, "decode", caller) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            stream = pb_grpc.InferenceServiceStub(channel).GenerateStream(pb.GenerateStreamRequest())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_probes_without_certificates_have_a_port_of_their_own(authority: Authority) -> None:
    """In clear, for health and nothing else, as long as the process serves."""
    shell = ServerShell(
        "decode", "127.0.0.1:0", tls=made(authority.issue("d", "tandem-decode"), "decode"), health="127.0.0.1:0"
    )
    servicer = Telling()
    pb_grpc.add_InferenceServiceServicer_to_server(servicer, shell.server)
    shell.add_service(SERVICE)
    await shell.start()
    async with grpc.aio.insecure_channel(shell.health_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == 2
        shell.set_serving(True)
        for name in ("", SERVICE, "liveness"):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.InferenceServiceStub(channel).Generate(pb.GenerateRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        await shell.stop(0)
        with pytest.raises(grpc.aio.AioRpcError):
            await health.Check(health_pb2.HealthCheckRequest(), timeout=5)


async def test_who_has_no_certificate_is_nobody(authority: Authority) -> None:
    """Where the server asks for none, a service for one role stays closed."""
    issued = authority.issue("d", "tandem-decode")
    async with serving(made(issued, "decode"), client_certificates=False) as (_, address):
        with pytest.raises(TandemError, match="needs a client certificate") as caught:
            await ask(open_channel(address, tls=client_tls(issued.ca)))
    assert caught.value.reason == "UNAUTHENTICATED"
    assert not NOBODY.known


def foreign(authority: Authority, folder: Path) -> ChannelTls | None:
    """A client whose certificate another authority signed, but who trusts ours."""
    (folder / "other").mkdir()
    issued = Authority(folder / "other").issue("g", "tandem-gateway")
    return client_tls(authority.ca, issued.cert, issued.key, "tandem-decode")


def expired(authority: Authority, folder: Path) -> ChannelTls | None:
    issued = authority.issue("g", "tandem-gateway", days=-1)
    return client_tls(authority.ca, issued.cert, issued.key, "tandem-decode")


def distrusting(authority: Authority, folder: Path) -> ChannelTls | None:
    """A client that doesn't know the server's authority."""
    issued = authority.issue("g", "tandem-gateway")
    (folder / "other").mkdir()
    return client_tls(Authority(folder / "other").ca, issued.cert, issued.key, "tandem-decode")


def misled(authority: Authority, folder: Path) -> ChannelTls | None:
    """A client that means another service."""
    issued = authority.issue("g", "tandem-gateway")
    return client_tls(authority.ca, issued.cert, issued.key, "tandem-prefill")


def bare(authority: Authority, folder: Path) -> ChannelTls | None:
    return client_tls(authority.ca, server_name="tandem-decode")


def clear(authority: Authority, folder: Path) -> ChannelTls | None:
    return None


@pytest.mark.parametrize("client", [foreign, expired, distrusting, misled, bare, clear])
async def test_who_does_not_connect(client: Any, authority: Authority, tmp_path: Path) -> None:
    server = made(authority.issue("d", "tandem-decode"), "decode")
    good = made(authority.issue("good", "tandem-gateway"), "gateway")
    async with serving(server) as (_, address):
        with pytest.raises(TandemError) as caught:
            await ask(open_channel(address, tls=client(authority, tmp_path)))
        assert caught.value.reason == "UNAVAILABLE"
        assert (await ask(open_service_channel(address, "decode", good))).request_id


async def test_renewal_while_a_stream_runs(authority: Authority) -> None:
    """The running stream goes on; a new connection gets the new certificates, of the server and of the client."""
    server_files, client_files = authority.issue("d", "tandem-decode"), authority.issue("g", "tandem-gateway")
    server, client = made(server_files, "decode"), made(client_files, "gateway")
    async with serving(server) as (servicer, address), open_service_channel(address, "decode", client) as old:
        stream = pb_grpc.InferenceServiceStub(old).GenerateStream(pb.GenerateStreamRequest())
        assert (await stream.read()).request_id == "first"
        before = await asyncio.to_thread(served_fingerprint, address, client_files)
        assert before == fingerprint(server_files.cert)
        authority.issue("d", "tandem-decode")
        authority.issue("g", "tandem-gateway")
        after = await asyncio.to_thread(served_fingerprint, address, client_files)
        assert after == fingerprint(server_files.cert) != before
        answer = await ask(open_service_channel(address, "decode", client))
        assert answer.request_id == fingerprint(client_files.cert)
        servicer.more.set()
        assert (await stream.read()).request_id == "last"
        assert await stream.read() is grpc.aio.EOF
    assert (server.version, client.version) == (2, 2)


def served_fingerprint(address: str, files: Issued) -> str:
    """Of the certificate that a server gives to a new connection."""
    host, port = address.split(":")
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.cert, files.key)
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection((host, int(port)), timeout=10)
    with plain, context.wrap_socket(plain, server_hostname="tandem-decode") as secured:
        return hashlib.sha256(secured.getpeercert(True) or b"").hexdigest()


async def test_authorities_are_renewed_too(authority: Authority, tmp_path: Path) -> None:
    """A bundle with a second authority lets its certificates in, without a restart."""
    (tmp_path / "next").mkdir()
    following, bundle = Authority(tmp_path / "next", "next"), tmp_path / "bundle.pem"
    issued, client = authority.issue("d", "tandem-decode"), following.issue("g", "tandem-gateway")
    bundle.write_bytes(authority.ca.read_bytes())
    server = Tls(TlsFiles(issued.cert, issued.key, bundle), "tandem-decode")
    access = client_tls(authority.ca, client.cert, client.key, "tandem-decode")
    async with serving(server) as (_, address):
        with pytest.raises(TandemError):
            await ask(open_channel(address, tls=access))
        bundle.write_bytes(authority.ca.read_bytes() + following.ca.read_bytes())
        assert (await ask(open_channel(address, tls=access))).request_id == fingerprint(client.cert)


async def test_a_bad_renewal_changes_nothing(authority: Authority) -> None:
    """An expired certificate, or the key of another one: the last good pair stays until there is a better one."""
    files = authority.issue("d", "tandem-decode")
    tls = made(files, "decode")
    client = made(authority.issue("g", "tandem-gateway"), "gateway")
    good = files.cert.read_bytes(), files.key.read_bytes()
    async with serving(tls) as (_, address):
        authority.issue("d", "tandem-decode", days=-1)
        assert (await ask(open_service_channel(address, "decode", client))).request_id
        files.key.write_bytes(good[1])
        assert (await ask(open_service_channel(address, "decode", client))).request_id
        assert tls.version == 1
        authority.issue("d", "tandem-decode")
        assert (await ask(open_service_channel(address, "decode", client))).request_id
        assert tls.version == 2


def test_what_is_refused_at_start(authority: Authority, tmp_path: Path) -> None:
    good, other = authority.issue("d", "tandem-decode"), authority.issue("other", "tandem-decode")
    (tmp_path / "b").mkdir()
    stranger = Authority(tmp_path / "b", "stranger")
    empty = tmp_path / "empty.pem"
    empty.touch()
    cases = [
        (TlsFiles(good.cert, other.key, good.ca), "--tls-key: .*other.key is no unencrypted private key"),
        (
            TlsFiles(good.cert, good.key, stranger.ca),
            "--tls-cert: .*d.crt would be refused by peers: unable to get local issuer",
        ),
        (TlsFiles(good.cert, good.key, empty), "--tls-ca: .*empty.pem holds no certificates"),
        (TlsFiles(empty, good.key, good.ca), "--tls-key: .*no unencrypted private key"),
        (TlsFiles(tmp_path / "none", good.key, good.ca), "--tls-cert: .*none can't be read: No such file"),
    ]
    for files, message in cases:
        with pytest.raises(ConfigError, match=message):
            Tls(files, "tandem-decode")
    with pytest.raises(ConfigError, match=r"refused by peers: .*tandem-prefill"):
        made(good, "prefill")
    with pytest.raises(ConfigError, match="refused by peers: certificate has expired"):
        made(authority.issue("d", "tandem-decode", days=-1), "decode")


def test_flags_come_together() -> None:
    assert tls_files(None, None, None) is None
    assert tls_files("a", "b", "c") == TlsFiles(Path("a"), Path("b"), Path("c"))
    with pytest.raises(ConfigError, match="--tls-key: --tls-cert, --tls-key and --tls-ca are needed together"):
        tls_files("a", None, "c")
    for empty in (("", "", ""), (None, "", None), ("a", "", "c")):
        with pytest.raises(ConfigError, match=r"--tls-(cert|key): it is empty"):
            tls_files(*empty)
    with pytest.raises(ConfigError, match="--tls-ca: it is empty"):
        client_tls("")
    assert client_tls(None) is None
    for given in ({"ca": None, "cert": "x"}, {"ca": "x", "cert": "x"}, {"ca": "x", "key": "x"}):
        with pytest.raises(ConfigError, match="--tls-"):
            client_tls(**given)


def test_clients_files_that_do_not_fit(authority: Authority, tmp_path: Path) -> None:
    """Told at once, not as a connection that fails."""
    good, other, nonsense = authority.issue("a"), authority.issue("b"), tmp_path / "nonsense"
    nonsense.write_text("nonsense")
    assert client_tls(good.ca, good.cert, good.key) is not None
    for given, words in (
        ((nonsense,), "--tls-ca: .*nonsense holds no certificates"),
        ((tmp_path / "none",), "--tls-ca: .*none can't be read"),
        ((good.ca, good.cert, other.key), "--tls-key: .*b.key is no unencrypted private key"),
        ((good.ca, nonsense, good.key), "--tls-key: "),
    ):
        with pytest.raises(ConfigError, match=words):
            client_tls(*given)


def test_a_renewal_between_two_looks_is_not_missed(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another connection reads a newer certificate while this one takes its own: the next one gets the newer."""
    issued = authority.issue("d", "tandem-decode")
    tls = made(issued, "decode")
    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", lambda first, fetch, **_: fetch)
    monkeypatch.setattr("tandem.service.tls._server_configuration", lambda pem: pem.cert)
    fetch: Any = tls.server_credentials()

    class Lock:
        def __init__(self, lock: Any) -> None:
            self.lock, self.renewals = lock, 1

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()
            if self.renewals:
                self.renewals -= 1
                authority.issue("d", "tandem-decode")
                assert tls.version

    authority.issue("d", "tandem-decode")
    monkeypatch.setattr(tls._pem, "_lock", Lock(tls._pem._lock))
    served = [fetch(), fetch(), fetch()]
    assert [cert for cert in served if cert][-1] == issued.cert.read_bytes()
