"""bench.transfer: how rows and misses are made of samples, and the two processes with every transport."""

from __future__ import annotations

import pytest

from bench.transfer import Sample, measure, misses, rows_of, transports_of
from bench.transfer_receiver import ReceivingEnd
from kv_transfer.registry import available
from tandem.errors import ConfigError, InternalError
from tandem.kv_layout import KvLayout

LAYOUT = KvLayout(block_size=4, dtype="bfloat16", num_layers=2, num_kv_heads=1, head_dim=8)


def sample(copy: float, bare: float, seconds: float, read: float) -> Sample:
    return Sample(
        copy, bare, bare / 8, {"shm": seconds, "nixl": seconds, "grpc": seconds}, {"shm": read, "nixl": read, "grpc": 0}
    )


def test_ratios_are_taken_run_by_run() -> None:
    """A machine that slows down by half between two runs changes no ratio."""
    shm, nixl, grpc = rows_of(4096, 10**9, [sample(1, 2, 1.25, 2.5), sample(2, 4, 2.5, 5), sample(1, 2, 1.25, 2.5)])
    assert (shm["gb_per_s"], shm["read_gb_per_s"], shm["copy_gb_per_s"]) == (0.8, 0.4, 1.0)
    assert (shm["of_copy"], shm["of_bare"]) == (0.8, None)
    assert (nixl["of_copy"], nixl["of_bare"], nixl["of_checked"]) == (0.8, 0.8, 0.9)
    assert (grpc["read_gb_per_s"], grpc["of_bare"]) == (None, None)


def test_musts_hold_for_large_sizes_alone() -> None:
    good, bad = sample(0.7, 0.8, 1, 1), sample(0.6, 0.72, 1, 1)
    assert misses(rows_of(2048, 10**9, [good])) == []
    assert misses(rows_of(1024, 10**9, [bad])) == []
    assert misses(rows_of(2048, 10**9, [bad])) == [
        "shm at 2048 tokens: of_copy is 0.6, must be 0.7 or more",
        "nixl at 2048 tokens: of_checked is 0.81, must be 0.9 or more",
    ]


def test_transports_are_those_that_are_here() -> None:
    assert transports_of(None) == available()
    assert transports_of("grpc") == ["grpc"]
    with pytest.raises(ConfigError, match=r"--transports.*pigeon"):
        transports_of("grpc,pigeon")


async def test_every_transport_brings_the_bytes() -> None:
    sizes = [3, 40]
    async with ReceivingEnd(LAYOUT, 10, available()) as end:
        rows = [row async for row in measure(end, LAYOUT, available(), sizes, 1)]
    assert [(row["transport"], row["tokens"]) for row in rows] == [(n, s) for s in sizes for n in available()]
    assert all(float(str(row["ms"])) > 0 for row in rows)


async def test_other_bytes_than_were_sent_are_an_error() -> None:
    async with ReceivingEnd(LAYOUT, 10, ["grpc"]) as end:
        end.source_blocks[0] += 1
        with pytest.raises(InternalError, match="other bytes"):
            await end.transfer("grpc", 4)
