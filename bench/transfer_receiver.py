"""The receiving end of `bench.transfer`: the decode service's own KvTransferService over a pool, with no engine behind.

Life: `async with ReceivingEnd(...)` starts the server and the sending process -> `transfer` and `read` as often as
needed -> both end.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, cast

from bench.transfer_sender import INCARNATION as SENDER
from bench.transfer_sender import MODEL, NUMERICS, fill_of
from decode_service import transfer_servicer
from decode_service.transfer_servicer import TransferServicer
from decode_service.worker import DecodeWorker
from kv_transfer.leases import Lease, LeaseTable
from kv_transfer.messages import Offer
from kv_transfer.pool import LocalPool
from kv_transfer.registry import target_transport
from kv_transfer.transport import SourceView
from tandem.errors import InternalError
from tandem.kv_layout import KvLayout
from tandem.service.server import ServerShell
from worker.identity import WorkerIdentity

INCARNATION = "bench-receiver"


class _Worker:
    """What the servicer asks of a decode worker, when there is no engine that could take the sequence."""

    stopping = False
    metrics = None
    alive = True

    def __init__(self, layout: KvLayout, pool: LocalPool, transports: Sequence[str]) -> None:
        self.pool_memory, self.other_pools = pool, ()
        self.leases = LeaseTable(INCARNATION, layout.block_size)
        self.engine = self
        self.identity = WorkerIdentity(
            INCARNATION, MODEL, MODEL, layout, NUMERICS, 1, 1, (), tuple(transports), pool.num_blocks, 1
        )

    def key_of(self, lease: Lease) -> str:
        return lease.request_id

    @contextlib.contextmanager
    def transferring(self, lease: Lease, attempt: int) -> Iterator[asyncio.Future[None]]:
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        yield over
        over.cancel()

    async def commit(self, key: str, record: object, token_end: int, blocks: object) -> None:
        """The sequence would join the batch here."""

    def fail_stream(self, key: str, error: Exception) -> None:
        raise error


class ReceivingEnd:
    """Server and sending process. Belongs to the event loop."""

    def __init__(self, layout: KvLayout, num_blocks: int, transports: Sequence[str]) -> None:
        """Touches the whole pool: a decode worker that has served a while has done so."""
        self._layout = layout
        self.pool = LocalPool(num_blocks, layout.block_bytes)
        self.pool.buffer[:] = bytes(len(self.pool.buffer))
        self._transports = list(transports)
        self._worker = _Worker(layout, self.pool, transports)
        self._blocks = list(range(num_blocks))
        random.Random(2).shuffle(self._blocks)
        self._address = ""
        self._process: asyncio.subprocess.Process | None = None
        self.source_blocks: list[int] = []
        self.endpoints: dict[str, bytes] = {}
        """Of the sending process, by transport."""
        self._views: dict[str, SourceView] = {}
        self._sums: dict[int, int] = {}

    async def __aenter__(self) -> Self:
        """Start both."""
        self._shell = ServerShell("decode", "127.0.0.1:0")
        targets = {name: target_transport(name) for name in self._transports}
        self._servicer = TransferServicer(cast(DecodeWorker, self._worker), targets)
        transfer_servicer.add_to_server(self._servicer, self._shell.server)
        self._address = await self._shell.start()
        settings = {
            "layout": dataclasses.asdict(self._layout),
            "num_blocks": self.pool.num_blocks,
            "transports": self._transports,
        }
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.transfer_sender", json.dumps(settings), stdin=pipe, stdout=pipe, limit=1 << 24
        )
        said = await self._answer()
        self.source_blocks = said["blocks"]
        self.endpoints = {name: bytes.fromhex(endpoint) for name, endpoint in said["endpoints"].items()}
        for name, endpoint in self.endpoints.items():
            if endpoint:
                self._views[name] = targets[name].connect(endpoint, SENDER, self._layout)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End both."""
        for view in self._views.values():
            view.close()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()
        await self._shell.server.stop(0)
        await asyncio.to_thread(self._servicer.close)

    async def transfer(self, transport: str, tokens: int) -> float:
        """Seconds of one transfer. Raises InternalError when it fails, or brings other bytes than were sent."""
        count = self._layout.blocks_for(tokens)
        blocks = self._blocks[:count]
        lease = self._worker.leases.grant("bench", 0, tokens, blocks, lambda: None)
        lease.request_id = lease.lease_id
        asked = {
            "transport": transport,
            "tokens": tokens,
            "lease": lease.lease_id,
            "address": self._address,
            "incarnation": INCARNATION,
        }
        try:
            said = await self._ask(asked)
        finally:
            lease.close()
        self._check(blocks)
        return float(said["seconds"])

    def read(self, transport: str, tokens: int) -> float:
        """Seconds of the transport's copy alone, generations checked; 0 where bytes ride in the stream."""
        view = self._views.get(transport)
        if view is None:
            return 0.0
        count = self._layout.blocks_for(tokens)
        blocks = tuple(self.source_blocks[:count])
        sums = tuple(self._sum_of(block) for block in blocks) if transport == "nixl" else ()
        offer = Offer(0, 0, tokens, blocks, (0,) * count, checksums=sums)
        start = time.perf_counter()
        view.copy(offer, self.pool, self._blocks[:count])
        seconds = time.perf_counter() - start
        self._check(self._blocks[:count])
        return seconds

    def _sum_of(self, block: int) -> int:
        """Of the sender's block, as its offer would say."""
        fill = fill_of(block)
        if fill not in self._sums:
            self._sums[fill] = zlib.crc32(bytes([fill]) * self._layout.block_bytes)
        return self._sums[fill]

    def _check(self, blocks: Sequence[int]) -> None:
        """The first and the last byte of every block, overwritten for the next transfer."""
        size, buffer = self.pool.block_bytes, self.pool.buffer
        for block, sent in zip(blocks, self.source_blocks, strict=False):
            for at in (block * size, (block + 1) * size - 1):
                if buffer[at] != fill_of(sent):
                    raise InternalError(f"block {block} has other bytes than the sender's block {sent}")
                buffer[at] = 255

    async def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        return await self._answer()

    async def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise InternalError("the sending process has ended; its error is above")
        said: dict[str, Any] = json.loads(line)
        return said
