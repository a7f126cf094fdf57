"""What it costs a decode worker that a prefill worker's pool isn't like its own: milliseconds for one prompt's KV.

    python -m bench.conversion                       # a table; some seconds
    python -m bench.conversion --tokens 8000 --json

One thread, one process, as one of decode's copying threads does it: the sender's blocks are in memory that it sees, and
`Landing` brings them into the reader's pool, straight where layouts are equal, else by way of staging. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from bench.report import emit
from bench.transfer import layout_of
from kv_transfer.landing import Landing
from kv_transfer.memory import PoolReader
from kv_transfer.messages import Offer
from kv_transfer.plan import plan_transfer
from kv_transfer.pool import LocalPool
from kv_transfer.ranks import RankViews
from kv_transfer.staging import StagingPool
from kv_transfer.transport import never
from tandem.errors import TandemError
from tandem.kv_layout import PAIRED_ORDER, KvLayout


def pairs_of(layout: KvLayout) -> Iterator[tuple[str, KvLayout, KvLayout]]:
    """What is measured: a name, the sender's layout and the reader's."""
    paired = replace(layout, order=PAIRED_ORDER)
    yield "equal", layout, layout
    yield "16 to 32", layout, replace(layout, block_size=32)
    yield "24 to 16", replace(layout, block_size=24), layout
    yield "plain to paired", layout, paired
    yield "paired, 16 to 32", paired, replace(paired, block_size=32)
    yield "float32 to bfloat16", replace(layout, dtype="float32"), layout
    yield "bfloat16 to int8", layout, replace(layout, dtype="int8")
    yield "bfloat16 to float8_e4m3", layout, replace(layout, dtype="float8_e4m3")


def measure(source: KvLayout, target: KvLayout, tokens: int, runs: int) -> float:
    """Median seconds to land `tokens` tokens; one more run goes before, not counted."""
    blocks = source.blocks_for(tokens)
    sent, landed = LocalPool(blocks, source.block_bytes), LocalPool(target.blocks_for(tokens), target.block_bytes)
    for pool in (sent, landed):
        pool.buffer[:] = bytes(pool.buffer.nbytes)  # touched, as those of workers that have served a while
    landing = Landing(plan_transfer(source, target), [landed], StagingPool(1))
    views = RankViews([PoolReader(sent)])
    offer = Offer(0, 0, tokens, tuple(range(blocks)), (0,) * blocks)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        landing.land(views, offer, range(landed.num_blocks), never)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def rows_of(layout: KvLayout, tokens: int, runs: int) -> list[Mapping[str, object]]:
    """A row for each pair."""
    rows: list[Mapping[str, object]] = []
    for name, source, target in pairs_of(layout):
        seconds = measure(source, target, tokens, runs)
        nbytes = source.blocks_for(tokens) * source.block_bytes
        rows.append(
            {"pools": name, "MB": round(nbytes / 1e6, 1), "ms": round(seconds * 1000, 1)}
            | {"GB/s": round(nbytes / seconds / 1e9, 2)}
        )
    return rows


def main() -> int:
    """Command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.conversion", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default", help="default, a path or hub:ORG/NAME: whose KV layout")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt")
    parser.add_argument("--runs", type=int, default=11, help="counted runs of each pair")
    parser.add_argument("--json", action="store_true", help="JSON lines in place of the table")
    arguments = parser.parse_args()
    try:
        layout = layout_of(arguments.model)
    except TandemError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        return 2
    emit(rows_of(layout, arguments.tokens, arguments.runs), as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
