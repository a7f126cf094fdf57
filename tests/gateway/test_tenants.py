"""Tenants and cache scopes on their way from the request to the workers' records."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from gateway_fakes import Cluster

from gateway.affinity import prefix_hashes
from gateway.tenants import ANONYMOUS, cache_scope
from tandem.v1 import decode_pb2

LOCAL, REMOTE = decode_pb2.PREFILL_SOURCE_LOCAL, decode_pb2.PREFILL_SOURCE_REMOTE


def test_scopes_differ_and_are_fixed() -> None:
    scopes = [cache_scope(tenant, salt) for tenant, salt in (("a", ""), ("b", ""), ("", "a"), ("a", "b"), ("ab", ""))]
    assert len(set(scopes)) == 5
    assert all(len(scope) == 64 for scope in scopes)
    assert cache_scope("a", "b") == scopes[3]
    assert cache_scope(ANONYMOUS) == ""


def test_affinity_keeps_scopes_apart() -> None:
    tokens = list(range(64))
    plain, one, other = prefix_hashes(tokens), prefix_hashes(tokens, cache_scope("a")), prefix_hashes(tokens, "b")
    assert len(plain) == len(one) == len(other) == 2
    assert not set(plain) & set(one)
    assert not set(one) & set(other)
    assert prefix_hashes(tokens, cache_scope("a")) == one


async def test_salts_keep_prefixes_apart(cluster: Cluster, serve: Any) -> None:
    """A prompt that the gateway thinks cached for one salt is not expected for another, and records say which."""
    await cluster.start()
    front = await serve()
    for salt in ("one", "one", "two", ""):
        await front.collect(front.stream(tokens=2, cache_salt=salt))
    decode, prefill = cluster.decode[0], cluster.prefill[0]
    assert decode.sources == [REMOTE, LOCAL, REMOTE, REMOTE]
    expected = [cache_scope(ANONYMOUS, salt) for salt in ("one", "one", "two", "")]
    assert [record.cache_scope for record in decode.records] == expected
    assert [request.record.cache_scope for request in prefill.requests] == [expected[0], *expected[2:]]
    assert all(record.tenant == ANONYMOUS for record in decode.records)


async def test_scope_survives_another_prefill_and_another_decode_worker(cluster: Cluster, serve: Any) -> None:
    """Retarget and migration start from records of the same scope."""
    await cluster.start(prefill=2, decode=2)
    deaths, drains = ["once"], ["once"]
    for prefill in cluster.prefill:
        prefill.die_after, prefill.faults = 0, deaths
    for decode in cluster.decode:
        decode.drain_after, decode.faults = 2, drains
    front = await serve()
    await front.collect(front.stream(tokens=6, cache_salt="mine"))
    records = [record for worker in (*cluster.prefill, *cluster.decode) for record in worker.records]
    assert sum(len(worker.records) for worker in cluster.decode) == 2
    assert sum(len(worker.records) for worker in cluster.prefill) >= 2
    assert {record.cache_scope for record in records} == {cache_scope(ANONYMOUS, "mine")}


async def test_salt_has_a_bound(cluster: Cluster, serve: Any) -> None:
    await cluster.start()
    front = await serve()
    with pytest.raises(grpc.aio.AioRpcError, match="at most 128") as caught:
        await front.collect(front.stream(cache_salt="x" * 129))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
