"""Which workers the gateway pairs, and what it believes each has cached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import grpc
import pytest
from gateway_fakes import LAYOUT, Cluster, expected, tokens_of, until

from gateway.affinity import Prefix, PrefixMemory, chunk_for
from gateway.fit import mismatch, traits_of
from tandem.service import wire
from tandem.v1 import types_pb2

KV = "v1/exact/kv-float32/x"


def info_of(numerics_id: str = KV, model_id: str = "m", convert: bool = False, **layout: Any) -> types_pb2.WorkerInfo:
    return types_pb2.WorkerInfo(
        model_id=model_id,
        numerics_id=numerics_id,
        layout=wire.layout_to_pb(replace(LAYOUT, **layout)),
        convert_kv_dtype=convert,
    )


@pytest.mark.parametrize(
    ("decode", "why"),
    [
        ({}, None),
        ({"block_size": 24}, None),
        ({"tp_size": 2, "num_kv_heads": 1}, None),
        ({"model_id": "n"}, "models differ"),
        ({"numerics_id": "v1/bf16/kv-float32/x"}, "numerics differ"),
        ({"head_dim": 4}, "head_dim is 8 and 4"),
        ({"dtype": "bfloat16", "numerics_id": "v1/exact/kv-bfloat16/x"}, "--convert-kv-dtype"),
        ({"dtype": "bfloat16", "numerics_id": "v1/exact/kv-bfloat16/x", "convert": True}, None),
        ({"dtype": "bfloat16", "numerics_id": "v1/bf16/kv-bfloat16/x", "convert": True}, "numerics differ"),
    ],
    ids=str,
)
def test_who_fits(decode: dict[str, Any], why: str | None) -> None:
    reason = mismatch(traits_of(info_of()), traits_of(info_of(**decode)))
    assert reason is None if why is None else reason is not None and why in reason


def test_a_layout_that_this_version_cannot_read_fits_nobody() -> None:
    strange = info_of()
    strange.layout.dtype = "int3"
    for pair in ((strange, info_of()), (info_of(), strange), (strange, strange)):
        assert "int3" in (mismatch(*map(traits_of, pair)) or "")
    forged = info_of()
    forged.layout.block_bytes += 1
    assert "bytes a block" in (mismatch(traits_of(forged), traits_of(info_of())) or "")


async def test_incompatible_layouts(cluster: Cluster, serve: Any) -> None:
    """FAILED_PRECONDITION with both layouts, before any transfer, and not serving."""
    await cluster.add_prefill()
    await cluster.add_decode(layout=wire.layout_to_pb(replace(LAYOUT, num_layers=3, block_size=32)))
    front = await serve()
    assert not front.gateway.pool.serving
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await front.collect(front.stream())
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    details = caught.value.details()
    assert str(LAYOUT) in details
    assert "block_size=32" in details
    assert "num_layers is 2 and 3" in details
    assert cluster.decode[0].records == []
    # A worker that fits makes it serve.
    fitting = await cluster.add_decode()
    addresses = [worker.address for worker in cluster.decode]
    front.gateway.pool.set_addresses([cluster.prefill[0].address], addresses)
    await until(lambda: front.gateway.pool.serving)
    assert tokens_of(await front.collect(front.stream())) == expected(8)
    assert len(fitting.records) == 1


async def test_other_block_sizes_are_paired(cluster: Cluster, serve: Any) -> None:
    """And the prefill worker is told of the decode worker's own layout and host."""
    await cluster.add_prefill()
    other = wire.layout_to_pb(replace(LAYOUT, block_size=24))
    await cluster.add_decode(layout=other, convert_kv_dtype=True, host_id="h")
    front = await serve()
    assert front.gateway.pool.serving
    assert tokens_of(await front.collect(front.stream())) == expected(8)
    (request,) = cluster.prefill[0].requests
    assert request.target.layout == other
    assert (request.target.convert_kv_dtype, request.target.host_id) == (True, "h")


async def test_only_pairs_that_fit_are_used(cluster: Cluster, serve: Any) -> None:
    """Beside a pair of two block sizes there are workers of other heads and dtypes: they get nothing, however idle."""
    other = wire.layout_to_pb(replace(LAYOUT, num_kv_heads=4))
    bf16 = wire.layout_to_pb(replace(LAYOUT, dtype="bfloat16"))
    await cluster.add_prefill(layout=other)
    fitting = await cluster.add_prefill(layout=wire.layout_to_pb(replace(LAYOUT, block_size=24)))
    await cluster.add_decode(layout=bf16)
    decode = await cluster.add_decode()
    decode.load.running_sequences = 20
    front = await serve()
    for number in range(3):
        prompt = range(100 * number, 100 * number + 64)
        assert tokens_of(await front.collect(front.stream(prompt=prompt))) == expected(8)
    assert len(fitting.records) == len(decode.records) == 3
    assert cluster.prefill[0].records == []
    assert cluster.decode[0].records == []


@pytest.mark.parametrize(("block_size", "chunk"), [(0, 32), (1, 32), (16, 32), (24, 48), (32, 32), (256, 256)])
def test_what_is_remembered_is_whole_blocks_of_the_worker(block_size: int, chunk: int) -> None:
    assert chunk_for(block_size) == chunk
    memory, tokens = PrefixMemory(block_size), list(range(100))
    memory.remember(Prefix(tokens))
    assert memory.expected(Prefix(tokens)) == 100 // chunk * chunk
    assert memory.expected(Prefix([*tokens[:60], 0, *tokens[61:]])) == 60 // chunk * chunk
    assert memory.expected(Prefix(tokens, "another scope")) == 0


def test_one_prompt_is_remembered_by_workers_of_two_block_sizes() -> None:
    prefix = Prefix(list(range(100)))
    first, second = PrefixMemory(16), PrefixMemory(24)
    first.remember(prefix)
    assert (first.expected(prefix), second.expected(prefix)) == (96, 0)
    second.remember(prefix)
    assert (first.expected(prefix), second.expected(prefix)) == (96, 96)
    longer = Prefix(list(range(200)))
    assert (first.expected(longer), second.expected(longer)) == (96, 96)
