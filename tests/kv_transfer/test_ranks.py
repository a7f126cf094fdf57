"""Workers with tensor parallelism, all ranks in one process: each has its own pool, endpoint and heads."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pools_of_tokens import as_bits, random_scales, random_tokens, read_values, with_ranks
from unlike_ends import NUM_BLOCKS, record, unlike_ends

from engine.block_pool import BlockPool
from kv_transfer.messages import Open
from kv_transfer.peers import Identity, SenderTable
from kv_transfer.ranks import RankedGenerations, RankedSource, connect_ranks, join_endpoints, split_endpoint
from kv_transfer.registry import source_transport
from tandem.errors import (
    DataCorruptionError,
    IncompatibleError,
    InternalError,
    InvalidRequestError,
    PermissionDeniedError,
    StaleError,
    UnavailableError,
)
from tandem.kv_layout import PAIRED_ORDER, KvLayout

LAYOUT = KvLayout(block_size=16, dtype="bfloat16", num_layers=2, num_kv_heads=6, head_dim=8)
EIGHT = replace(LAYOUT, num_kv_heads=8)
THREE = replace(LAYOUT, num_kv_heads=3)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (with_ranks(EIGHT, 2), EIGHT),
        (EIGHT, with_ranks(EIGHT, 2)),
        (with_ranks(EIGHT, 2), with_ranks(EIGHT, 2)),
        (with_ranks(EIGHT, 4), with_ranks(EIGHT, 2)),
        (with_ranks(THREE, 3), THREE),
        (THREE, with_ranks(THREE, 3)),
        (with_ranks(LAYOUT, 2), with_ranks(LAYOUT, 3)),
        (with_ranks(LAYOUT, 3), with_ranks(LAYOUT, 2)),
        (with_ranks(replace(LAYOUT, block_size=24), 3), with_ranks(replace(LAYOUT, order=PAIRED_ORDER), 2)),
        (with_ranks(EIGHT, 2), with_ranks(replace(EIGHT, block_size=32), 2)),
    ],
    ids=lambda layout: f"{layout.block_size}x{layout.num_kv_heads}of{layout.tp_size}",
)
@pytest.mark.parametrize("chunk", [40, 512])
def test_every_head_reaches_its_rank(transport: str, source: KvLayout, target: KvLayout, chunk: int) -> None:
    codes, start, end = random_tokens(source, 103), target.block_size, 103
    with unlike_ends(transport, source, target) as ends:
        ends.write(codes)
        lease = ends.grant(start, end)
        ends.send(lease, [*range(chunk, end, chunk), end])
        assert torch.equal(as_bits(ends.read(lease)), as_bits(codes[:, :, :, start:]))
        lease.close()
        assert ends.released == ["r"]


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_scales_travel_with_their_heads(any_transport: str, dtype: str) -> None:
    """To the bit, over other blocks and other ranks."""
    source = with_ranks(replace(LAYOUT, dtype=dtype, block_size=32), 2)
    target = with_ranks(replace(LAYOUT, dtype=dtype), 3)
    codes = random_tokens(source, 75)
    with unlike_ends(any_transport, source, target) as ends:
        ends.write(codes)
        lease = ends.grant(0, 75)
        ends.send(lease, [75])
        values = codes.float() * random_scales(source, 75)
        assert torch.equal(read_values(ends.target_pools, target, lease.blocks, 75), values)


def test_dtype_and_ranks_at_once() -> None:
    source, target = with_ranks(LAYOUT, 2), with_ranks(replace(LAYOUT, dtype="int8", block_size=24), 3)
    codes = random_tokens(source, 75)
    with unlike_ends("grpc", source, target, convert_dtype=True) as ends:
        ends.write(codes)
        lease = ends.grant(0, 75)
        ends.send(lease, [30, 75])
        got = read_values(ends.target_pools, target, lease.blocks, 75)
        assert (got - codes.float()).abs().max() <= codes.float().abs().max() / 127
        assert got.any()


@pytest.mark.parametrize("name", ["memory", "shm"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_block_reused_on_any_rank_is_noticed(name: str, rank: int) -> None:
    with unlike_ends(name, with_ranks(LAYOUT, 2), LAYOUT) as ends:
        lease = ends.grant(0, 40)
        send, receive = ends.opened(lease)
        send.ready(40, ends.source_blocks)
        offer = send.next_offer()
        assert offer is not None
        plan = receive.on_offer(offer)
        ends.source_pools[rank].generations[ends.source_blocks[2]] += 1
        with pytest.raises(StaleError):
            receive.copy(plan)
        ends.source_pools[rank].generations[ends.source_blocks[2]] -= 1
        receive.copy(plan)
        ends.source_pools[rank].generations[ends.source_blocks[0]] += 1
        with pytest.raises(StaleError):
            receive.on_commit(send.commit(record()))
        assert not lease.committed


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda o: replace(o, payload=o.payload[:-1] + bytes([o.payload[-1] ^ 1])), DataCorruptionError),
        (lambda o: replace(o, payload=o.payload[:-1]), InvalidRequestError),
        (lambda o: replace(o, payload=o.payload + b"x"), InvalidRequestError),
        (lambda o: replace(o, payload=o.payload[: len(o.payload) // 2]), InvalidRequestError),
        (lambda o: replace(o, checksums=o.checksums[: len(o.checksums) // 2]), InvalidRequestError),
    ],
)
def test_damage_to_the_last_ranks_bytes(ranks: int, change: Any, error: type[Exception]) -> None:
    with unlike_ends("grpc", with_ranks(LAYOUT, 2), with_ranks(LAYOUT, ranks)) as ends:
        ends.write(random_tokens(LAYOUT, 40))
        lease = ends.grant(0, 40)
        send, receive = ends.opened(lease)
        send.ready(40, ends.source_blocks)
        offer = send.next_offer()
        assert offer is not None
        with pytest.raises(error):
            receive.copy(receive.on_offer(change(offer)))
        assert not lease.committed


def test_heads_that_dont_add_up_are_refused() -> None:
    source, target = with_ranks(EIGHT, 2), with_ranks(LAYOUT, 2)
    with unlike_ends("memory", source, target) as ends:
        with pytest.raises(IncompatibleError, match="total_kv_heads is 8 and 6") as caught:
            ends.opened(ends.grant(0, 40))
        assert str(source) in caught.value.message
        assert str(target) in caught.value.message


def test_one_block_pool_rules_all_ranks() -> None:
    with unlike_ends("memory", with_ranks(LAYOUT, 3), LAYOUT) as ends:
        pool = BlockPool(NUM_BLOCKS, 16, generations=RankedGenerations(ends.source_pools))
        (block,) = pool.allocate(1)
        assert [pool.generations[block] for pool in ends.source_pools] == [1, 1, 1]
        pool.release([block])
        assert pool.allocate(1) == [block]
        assert [pool.generations[block] for pool in ends.source_pools] == [2, 2, 2]


def test_endpoints_of_ranks() -> None:
    assert split_endpoint(b"alone", 1) == [b"alone"]
    assert join_endpoints([b"alone"]) == b"alone"
    for endpoints in ([b"a", b"bc"], [b"", b""], [b"x" * 300, b"", b"y"]):
        joined = join_endpoints(endpoints)
        assert split_endpoint(joined, len(endpoints)) == endpoints
        for wrong in (joined[:-1], joined + b"z", b""):
            with pytest.raises(InvalidRequestError):
                split_endpoint(wrong, len(endpoints))
        with pytest.raises(InvalidRequestError):
            split_endpoint(joined, len(endpoints) + 1)


def test_views_that_were_opened_are_closed_when_a_rank_is_missing() -> None:
    closed: list[bytes] = []

    class Transport:
        name = "half"

        def connect(self, endpoint: bytes, _incarnation: str, _layout: KvLayout) -> Any:
            if endpoint == b"gone":
                raise UnavailableError("nobody there")
            return SimpleNamespace(close=lambda: closed.append(endpoint))

        def close(self) -> None: ...

    with pytest.raises(UnavailableError):
        connect_ranks(Transport(), join_endpoints([b"a", b"b", b"gone"]), "i", with_ranks(LAYOUT, 3))
    assert closed == [b"a", b"b"]


def test_all_ranks_have_one_transport() -> None:
    with unlike_ends("memory", with_ranks(LAYOUT, 2), LAYOUT) as ends:
        others = [source_transport(name, ends.source_pool, "s") for name in ("memory", "grpc")]
        with pytest.raises(InternalError):
            RankedSource(others)
        for other in others:
            other.close()
        with pytest.raises(InternalError):
            replace(ends.receiver, other_pools=(ends.target_pools[0],))


def test_no_rank_of_another_senders_may_be_presented() -> None:
    layout = with_ranks(LAYOUT, 2)
    mine = Open("l", 0, "me", "t", "m", "n", layout, "shm", join_endpoints([b"a", b"b"]), b"s" * 32)
    table, identity = SenderTable(), Identity(frozenset({"p"}), "f")
    table.bind(identity, mine)
    table.check(identity, mine)
    for endpoints in ([b"x", b"b"], [b"a", b"x"]):
        with pytest.raises(PermissionDeniedError, match="endpoint of incarnation 'me'"):
            table.check(identity, replace(mine, source_incarnation="you", endpoint=join_endpoints(endpoints)))
    with pytest.raises(PermissionDeniedError, match="another endpoint"):
        table.check(identity, replace(mine, endpoint=join_endpoints([b"b", b"a"])))
