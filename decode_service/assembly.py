"""Puts a decode worker together around a runner. Torch-free; `wiring` brings a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from decode_service import transfer_servicer
from decode_service.config import SchedulerConfig
from decode_service.metrics import StepMetrics
from decode_service.scheduler import Scheduler
from decode_service.servicer import DecodeServicer
from decode_service.speculation.config import SpeculationConfig
from decode_service.speculation.costs import StepCosts
from decode_service.speculation.speculator import Speculator
from decode_service.streams import DEFAULT_LIMIT
from decode_service.transfer_servicer import TransferServicer
from decode_service.worker import DecodeWorker
from engine.batch import StepRunner
from engine.block_pool import BlockPool
from kv_transfer.pool import PoolView
from kv_transfer.registry import target_transport
from tandem.service.metrics import Metrics
from tandem.service.peers import callers
from tandem.service.server import ServerShell
from tandem.service.tls import ROLE_NAMES, Tls
from tandem.v1 import decode_pb2_grpc
from worker import assembly
from worker.identity import WorkerIdentity

SERVICES = {
    "tandem.v1.DecodeService": ROLE_NAMES["gateway"],
    "tandem.v1.KvTransferService": ROLE_NAMES["prefill"],
}
"""What a decode worker serves, and whose certificate it takes."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a worker is made of beside its servers. `blocks` is the KV cache's memory."""

    identity: WorkerIdentity
    scheduler: SchedulerConfig
    runner: StepRunner
    blocks: memoryview
    prefix_cache: bool = True
    stream_limit: int = DEFAULT_LIMIT
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    step_costs: Mapping[int, float] = field(default_factory=dict)
    """Seconds of a step by its rows, as measured at the start."""
    other_blocks: tuple[memoryview, ...] = ()
    """With several ranks: `blocks` of rank 1 and up."""


@dataclass(slots=True)
class Assembly(assembly.Assembly):
    """A decode worker in a server that is not started yet."""

    worker: DecodeWorker
    transfers: TransferServicer
    pool: BlockPool

    async def close(self) -> None:
        """After the server has stopped."""
        await assembly.Assembly.close(self)
        await asyncio.to_thread(self.transfers.close)


def assemble(
    parts: Parts,
    listen: str,
    metrics: Metrics | None = None,
    tls: Tls | None = None,
    health: str | None = None,
) -> Assembly:
    """Build a worker and its server. Inside a running event loop. Raises ConfigError.

    With `tls` only gateways may have it decode, and only prefill workers may send it KV. `health`: see `ServerShell`.
    """
    identity = parts.identity
    generations = memoryview(bytearray(8 * identity.total_blocks)).cast("Q")
    pool = BlockPool(
        identity.total_blocks, identity.layout.block_size, prefix_cache=parts.prefix_cache, generations=generations
    )
    pools = [
        PoolView(blocks, identity.layout.block_bytes, identity.total_blocks, generations)
        for blocks in (parts.blocks, *parts.other_blocks)
    ]
    for borrower in parts.speculation.borrowers:
        borrower.borrow(pool)
    speculator = Speculator(parts.speculation, parts.scheduler.vocab_size, StepCosts(parts.step_costs))
    worker = DecodeWorker(
        identity,
        Scheduler(parts.scheduler, pool, speculator),
        parts.runner,
        pools[0],
        pools[1:],
        metrics=StepMetrics(metrics) if metrics is not None else None,
        stream_limit=parts.stream_limit,
    )
    transfers = TransferServicer(worker, {name: target_transport(name) for name in identity.transports})
    admit = callers(SERVICES) if tls is not None else None
    shell = ServerShell("decode", listen, tls=tls, admit=admit, health=health)
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(worker), shell.server)
    transfer_servicer.add_to_server(transfers, shell.server)
    for name in SERVICES:
        shell.add_service(name)
    return Assembly(shell, worker, transfers, pool)
