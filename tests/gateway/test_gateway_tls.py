"""A gateway and its workers under TLS: whom it calls, who calls it, and renewed certificates."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, Issued
from gateway_fakes import Cluster, expected, tokens_of, until
from structlog.testing import capture_logs

from tandem.errors import UnavailableError
from tandem.service.channel import open_service_channel
from tandem.service.status import from_rpc_error
from tandem.service.tls import Tls, TlsFiles, client_tls


def files(issued: Issued) -> TlsFiles:
    return TlsFiles(issued.cert, issued.key, issued.ca)


def fingerprint(cert: Path) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(cert.read_text())).hexdigest()


async def workers(cluster: Cluster, authority: Authority) -> None:
    for role, add in (("prefill", cluster.add_prefill), ("decode", cluster.add_decode)):
        name = f"tandem-{role}"
        await add(tls=Tls(files(authority.issue(role, name)), name))


@pytest.mark.parametrize("client_certificates", [False, True])
async def test_requests_under_tls(
    cluster: Cluster, serve: Any, authority: Authority, client_certificates: bool
) -> None:
    """Clients without a certificate get in unless it is required."""
    await workers(cluster, authority)
    gateway, client = authority.issue("gateway", "tandem-gateway"), authority.issue("client")
    bindings = {"tls": files(gateway), "client_certificates": client_certificates}
    front = await serve(bindings=bindings, tls=client_tls(client.ca, client.cert, client.key))
    assert tokens_of(await front.collect(front.stream(tokens=4))) == expected(4)
    assert len(cluster.prefill[0].requests) == 1
    assert cluster.decode[0].callers == [fingerprint(gateway.cert)]
    bare = await serve(bindings=bindings, tls=client_tls(client.ca))
    if client_certificates:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bare.collect(bare.stream(tokens=4))
        assert isinstance(from_rpc_error(caught.value), UnavailableError)
    else:
        assert tokens_of(await bare.collect(bare.stream(tokens=4))) == expected(4)


async def test_a_gateway_without_the_name_finds_no_worker(cluster: Cluster, serve: Any, authority: Authority) -> None:
    """Another role's certificate: workers refuse to say what they are, which is logged once; requests are told that
    there is none.
    """
    await workers(cluster, authority)
    front = await serve(wait_ready=False)
    front.gateway.pool.set_addresses([], [])
    other = authority.issue("prefill-too", "tandem-prefill")
    front.gateway.pool._tls = Tls(files(other), "tandem-prefill")
    with capture_logs() as lines:
        front.gateway.pool.set_addresses([], [cluster.decode[0].address])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await front.collect(front.stream(tokens=4))
    assert from_rpc_error(caught.value).reason == "NO_WORKER"
    assert not cluster.decode[0].callers
    (line,) = (line for line in lines if line["event"].startswith("worker can't be reached"))
    assert "this one has tandem-prefill" in str(line)


async def test_what_runs_on_an_old_channel_ends_there(cluster: Cluster, serve: Any, authority: Authority) -> None:
    """Load reports stop, the connection stands: new requests get the new channel, those aboard stay on the old one."""
    await workers(cluster, authority)
    (decode,) = cluster.decode
    gateway = authority.issue("gateway", "tandem-gateway")
    front = await serve(bindings={"tls": files(gateway)}, tls=client_tls(gateway.ca))
    worker = front.gateway.pool.decode[0]
    decode.stream_pause_after = 1
    running = front.stream(tokens=3)
    assert (await running.read()).prompt.prompt_tokens == 64
    old_channel, old_feed = worker.channel, worker.feed
    authority.issue("gateway", "tandem-gateway")
    decode.load_silent = True
    await until(lambda: worker.channel is not old_channel)
    decode.load_silent = False
    await front.until_ready(1, 1)
    assert worker.feed is not old_feed
    decode.resume.set()
    assert tokens_of(await front.collect(front.stream(tokens=3, prompt=range(500, 600)))) == expected(3)
    assert tokens_of(await front.collect(running)) == expected(3)
    assert running.done()


async def test_a_reconnect_takes_the_renewed_certificate(cluster: Cluster, serve: Any, authority: Authority) -> None:
    """The worker is gone and back: the gateway comes with what it has now, not with what it began with."""
    await workers(cluster, authority)
    gateway = authority.issue("gateway", "tandem-gateway")
    front = await serve(bindings={"tls": files(gateway)}, tls=client_tls(gateway.ca))
    first, old = fingerprint(gateway.cert), front.gateway.pool.decode[0].channel
    assert tokens_of(await front.collect(front.stream(tokens=4))) == expected(4)
    authority.issue("gateway", "tandem-gateway")
    (lost,) = cluster.decode
    await lost.stop()
    decode = authority.issue("decode", "tandem-decode")
    fresh = await cluster.add_decode(listen=lost.address, tls=Tls(files(decode), "tandem-decode"))
    cluster.decode.remove(lost)
    await until(lambda: fresh.callers)
    assert set(fresh.callers) == {fingerprint(gateway.cert)} != {first}
    await until(lambda: old.get_state() is grpc.ChannelConnectivity.SHUTDOWN)
    await front.until_ready(1, 1)
    assert tokens_of(await front.collect(front.stream(tokens=4, prompt=range(500, 600)))) == expected(4)


async def test_a_failed_reconnect_does_not_end_the_watch(
    cluster: Cluster, serve: Any, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again, and requests go on, on the old channel until there is another."""
    await workers(cluster, authority)
    (decode,) = cluster.decode
    gateway = authority.issue("gateway", "tandem-gateway")
    front = await serve(bindings={"tls": files(gateway)}, tls=client_tls(gateway.ca))
    worker, failures = front.gateway.pool.decode[0], []
    old = worker.channel

    def opened(*args: Any, **options: Any) -> grpc.aio.Channel:
        if len(failures) < 2:
            failures.append(args)
            raise OSError("no more descriptors")
        return open_service_channel(*args, **options)

    monkeypatch.setattr("gateway.workers.open_service_channel", opened)
    authority.issue("gateway", "tandem-gateway")
    decode.load_silent = True
    await until(lambda: worker.channel is not old)
    decode.load_silent = False
    await front.until_ready(1, 1)
    assert len(failures) == 2
    assert tokens_of(await front.collect(front.stream(tokens=3))) == expected(3)
