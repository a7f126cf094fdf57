"""The sending process of `bench.transfer`: a pool, its transports, and the prefill service's own sender. No engine.

Says what it is in one JSON line; for each JSON line on stdin it makes one transfer and answers with seconds and bytes.
Block b of its pool is filled with the byte b % 251.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kv_transfer.pool import PoolMemory, SharedPool
from kv_transfer.registry import source_transport
from kv_transfer.session import Sender, SendSession
from prefill_service.channels import Channels
from prefill_service.sender import Transfer
from prefill_service.worker import SEND_THREADS
from tandem.kv_layout import KvLayout
from tandem.record import OutputState, Record, SamplingParams, StopRules
from tandem.service import server

INCARNATION, MODEL, NUMERICS = "bench-sender", "bench", "bench"
OPEN_LOOK_SECONDS = 0.0005


def fill_of(block: int) -> int:
    """The byte that fills a block."""
    return block % 251


def record_of(request_id: str) -> Record:
    """What a commit brings."""
    return Record(request_id, MODEL, [1], SamplingParams(), StopRules(8), [OutputState([7])])


class SendingEnd:
    """Inside a running event loop."""

    def __init__(self, layout: KvLayout, num_blocks: int, transports: list[str]) -> None:
        """Touches the whole pool."""
        self._pool = SharedPool(num_blocks, layout.block_bytes)
        fill(self._pool)
        self._layout = layout
        self._sender = Sender(INCARNATION, MODEL, NUMERICS, layout)
        self.sources = {name: source_transport(name, self._pool, INCARNATION) for name in transports}
        self._channels = Channels()
        self._executor = ThreadPoolExecutor(SEND_THREADS)
        self.blocks = list(range(num_blocks))
        random.Random(1).shuffle(self.blocks)

    async def send(self, asked: Mapping[str, Any]) -> dict[str, float]:
        """One transfer of all tokens at once, timed from when they are ready to the commit; the stream is open then."""
        tokens = asked["tokens"]
        session = SendSession(
            self._sender,
            self.sources[asked["transport"]],
            lease_id=asked["lease"],
            attempt=0,
            target_incarnation=asked["incarnation"],
        )
        transfer = Transfer(session, self._channels, asked["address"], self._executor, most_tokens=tokens)
        running = asyncio.create_task(transfer.run(None))
        while not session.opened and not running.done():  # noqa: ASYNC110  # the session knows no event loop
            await asyncio.sleep(OPEN_LOOK_SECONDS)
        start = time.perf_counter()
        transfer.reserve(self.blocks)
        transfer.ready(tokens)
        transfer.finish(record_of(asked["lease"]))
        result = await running
        return {"seconds": time.perf_counter() - start, "bytes": result.bytes_sent}

    async def close(self) -> None:
        """End connections and transports."""
        await self._channels.close()
        self._executor.shutdown()
        for source in self.sources.values():
            source.close()


def fill(pool: PoolMemory) -> None:
    """Give every block its byte."""
    size = pool.block_bytes
    for block in range(pool.num_blocks):
        pool.buffer[block * size : (block + 1) * size] = bytes([fill_of(block)]) * size


async def serve(settings: Mapping[str, Any]) -> int:
    """Until stdin ends."""
    end = SendingEnd(KvLayout(**settings["layout"]), settings["num_blocks"], settings["transports"])
    endpoints = {name: source.endpoint().hex() for name, source in end.sources.items()}
    print(json.dumps({"blocks": end.blocks, "endpoints": endpoints}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await end.send(json.loads(line))), flush=True)
    await end.close()
    return 0


if __name__ == "__main__":
    sys.exit(server.run(lambda: serve(json.loads(sys.argv[1]))))
