"""KV transfer between two processes: GB/s of each transport, beside a plain memory copy and a bare NIXL agent.

    python -m bench.transfer                                  # JSON lines, then a table; about two minutes
    python -m bench.transfer --transports shm --tokens 512,8000 --runs 21

`ms` and `gb_per_s` go the services' own way: the prefill service's sender, gRPC, KvTransferService, sessions with
generations and commit; only the engines are missing. A prompt's blocks are ready at once, timed until the commit is
answered. `read_gb_per_s` is the transport alone: one copy of the same blocks, generations checked before and after.

Each run takes turns: memory copy (one thread), bare NIXL agent, then each transport. Figures are medians; `of_copy`
(ms beside the memory copy), `of_bare` (read beside the bare agent, which takes no checksums) and `of_checked` (beside
the bare agent and the same checksums after it, in one thread) are medians of the runs' ratios. Both pools were
touched before, as those of workers that have served a while.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from bench.floors import measure_rates
from bench.growth import parse_numbers
from bench.report import emit
from bench.transfer_baselines import BareNixl, Timed, memory_copy
from bench.transfer_receiver import ReceivingEnd
from engine.weights.checkpoint import read_config
from kv_transfer.registry import available
from tandem.errors import ConfigError, TandemError
from tandem.kv_layout import KvLayout
from tandem.models import resolve_model
from tandem.service import server

TOKENS = "16,64,256,512,1024,2048,4096,8000"
BLOCK_SIZE = 16
LARGE_TOKENS = 2048
"""From here on the musts hold."""
SHM_OF_COPY, NIXL_OF_BARE = 0.7, 0.9

SHORT_NAMES = {
    "transport": "by",
    "tokens": "tokens",
    "mb": "MB",
    "ms": "ms",
    "gb_per_s": "GB/s",
    "read_gb_per_s": "read",
    "copy_gb_per_s": "copy",
    "of_copy": "/ copy",
    "of_bare": "/ bare",
    "of_checked": "/ checked",
}
"""Columns of the printed table."""

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of one run; `bare` and `checks` (of the blocks that it read) are 0 without NIXL, a read is 0 where bytes
    ride in the stream.
    """

    copy: float
    bare: float
    checks: float
    transports: Mapping[str, float]
    reads: Mapping[str, float]


def layout_of(model: str) -> KvLayout:
    """The KV layout of a model's workers by default: blocks of 16 tokens, bfloat16. Raises ConfigError."""
    config = read_config(str(resolve_model(model)))
    return KvLayout(BLOCK_SIZE, "bfloat16", config.num_layers, config.num_kv_heads, config.head_dim)


def rows_of(tokens: int, nbytes: int, samples: Sequence[Sample]) -> list[Row]:
    """A row for each transport of one size."""
    copy = statistics.median(sample.copy for sample in samples)
    rows: list[Row] = []
    for name in samples[0].transports:
        seconds = statistics.median(sample.transports[name] for sample in samples)
        read = statistics.median(sample.reads[name] for sample in samples)
        of_bare = [sample.bare / sample.reads[name] for sample in samples] if name == "nixl" else []
        of_checked = [(s.bare + s.checks) / s.reads[name] for s in samples] if name == "nixl" else []
        rows.append(
            {
                "transport": name,
                "tokens": tokens,
                "mb": round(nbytes / 1e6, 1),
                "ms": round(seconds * 1000, 2),
                "gb_per_s": round(nbytes / seconds / 1e9, 2),
                "read_gb_per_s": round(nbytes / read / 1e9, 2) if read else None,
                "copy_gb_per_s": round(nbytes / copy / 1e9, 2),
                "of_copy": round(statistics.median(s.copy / s.transports[name] for s in samples), 2),
                "of_bare": round(statistics.median(of_bare), 2) if of_bare else None,
                "of_checked": round(statistics.median(of_checked), 2) if of_checked else None,
            }
        )
    return rows


def misses(rows: Sequence[Row]) -> list[str]:
    """Which musts a run misses, in words; empty: none."""
    said = []
    for row in rows:
        for name, key, least in (("shm", "of_copy", SHM_OF_COPY), ("nixl", "of_checked", NIXL_OF_BARE)):
            value = row[key]
            large = int(str(row["tokens"])) >= LARGE_TOKENS
            if row["transport"] == name and large and isinstance(value, float) and value < least:
                said.append(f"{name} at {row['tokens']} tokens: {key} is {value}, must be {least} or more")
    return said


async def measure(
    end: ReceivingEnd, layout: KvLayout, transports: Sequence[str], sizes: Sequence[int], runs: int
) -> AsyncIterator[Row]:
    """Rows, size by size; one more run goes before, not counted."""
    copy = memory_copy(end.pool)
    bare = BareNixl(end.endpoints["nixl"], end.pool, end.source_blocks) if "nixl" in transports else None
    for tokens in sizes:
        blocks = layout.blocks_for(tokens)
        samples = [await _sample(end, transports, tokens, blocks, copy, bare) for _ in range(runs + 1)][1:]
        for row in rows_of(tokens, blocks * layout.block_bytes, samples):
            yield row
    if bare is not None:
        bare.close()


async def _sample(
    end: ReceivingEnd, transports: Sequence[str], tokens: int, blocks: int, copy: Timed, bare: BareNixl | None
) -> Sample:
    return Sample(
        copy(blocks),
        bare(blocks) if bare is not None else 0.0,
        bare.checks(blocks) if bare is not None else 0.0,
        {name: await end.transfer(name, tokens) for name in transports},
        {name: end.read(name, tokens) for name in transports},
    )


async def run(arguments: argparse.Namespace) -> int:
    """0, or 1 when a must is missed."""
    layout, sizes = layout_of(arguments.model), parse_numbers("--tokens", arguments.tokens)
    transports = transports_of(arguments.transports)
    rates = measure_rates()
    print(json.dumps({"read_gb_per_s": round(rates.read_gb_per_s, 1), "block_bytes": layout.block_bytes}), flush=True)
    rows = []
    async with ReceivingEnd(layout, layout.blocks_for(max(sizes)), transports) as end:
        async for row in measure(end, layout, transports, sizes, arguments.runs):
            print(json.dumps(row), flush=True)
            rows.append(row)
    emit(
        [{short: "" if row[key] is None else row[key] for key, short in SHORT_NAMES.items()} for row in rows],
        as_json=False,
    )
    missed = misses(rows)
    print("\n".join(missed) or "every must is met")
    return 1 if missed else 0


def transports_of(text: str | None) -> list[str]:
    """A comma-separated list; None means all of this machine. Raises ConfigError."""
    here = available()
    names = [name.strip() for name in text.split(",")] if text is not None else here
    for name in names:
        if name not in here:
            raise ConfigError(f"--transports: {name!r} is not available here; available are {', '.join(here)}")
    return names


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.transfer", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default", help="default, a path or hub:ORG/NAME: whose KV layout")
    parser.add_argument("--transports", help="comma-separated; default: all that are here")
    parser.add_argument("--tokens", default=TOKENS, help="prompt lengths")
    parser.add_argument("--runs", type=int, default=11, help="counted runs of each size")
    arguments = parser.parse_args()
    try:
        return server.run(lambda: run(arguments))
    except TandemError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
