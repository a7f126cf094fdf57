"""Puts a prefill worker together around a runner. Torch-free; `wiring` brings a real engine."""

from __future__ import annotations

from dataclasses import dataclass

from engine.batch import StepRunner
from engine.block_pool import BlockPool
from kv_transfer.pool import PoolMemory
from kv_transfer.ranks import RankedGenerations, RankedSource
from kv_transfer.registry import source_transport
from kv_transfer.transport import SourceTransport
from prefill_service.config import SchedulerConfig
from prefill_service.metrics import StepMetrics
from prefill_service.scheduler import Scheduler
from prefill_service.servicer import PrefillServicer
from prefill_service.worker import PrefillWorker
from tandem.service.metrics import Metrics
from tandem.service.peers import callers
from tandem.service.server import ServerShell
from tandem.service.tls import ROLE_NAMES, Tls
from tandem.v1 import prefill_pb2_grpc
from worker import assembly
from worker.identity import WorkerIdentity

SERVICE = "tandem.v1.PrefillService"


@dataclass(frozen=True, slots=True)
class Parts:
    """What a worker is made of beside its server. `memory` holds the KV cache's blocks and their generations."""

    identity: WorkerIdentity
    scheduler: SchedulerConfig
    runner: StepRunner
    memory: PoolMemory
    prefix_cache: bool = True
    other_memories: tuple[PoolMemory, ...] = ()
    """With several ranks: of rank 1 and up."""

    @property
    def memories(self) -> tuple[PoolMemory, ...]:
        """One a rank."""
        return (self.memory, *self.other_memories)


@dataclass(slots=True)
class Assembly(assembly.Assembly):
    """A prefill worker in a server that is not started yet."""

    worker: PrefillWorker
    scheduler: Scheduler


def assemble(
    parts: Parts,
    listen: str,
    metrics: Metrics | None = None,
    tls: Tls | None = None,
    health: str | None = None,
) -> Assembly:
    """Build a worker and its server. Inside a running event loop. Raises ConfigError.

    With `tls` only gateways may call it. `health`: see `ServerShell`.
    """
    identity = parts.identity
    pool = BlockPool(
        identity.total_blocks,
        identity.layout.block_size,
        prefix_cache=parts.prefix_cache,
        generations=RankedGenerations(parts.memories) if parts.other_memories else parts.memory.generations,
    )
    scheduler = Scheduler(parts.scheduler, pool)
    admit = callers({SERVICE: ROLE_NAMES["gateway"]}) if tls is not None else None
    shell = ServerShell("prefill", listen, tls=tls, admit=admit, health=health)
    transports = {name: _source(name, parts) for name in identity.transports}
    worker = PrefillWorker(
        identity, scheduler, parts.runner, transports, StepMetrics(metrics) if metrics is not None else None, tls
    )
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(worker), shell.server)
    shell.add_service(SERVICE)
    return Assembly(shell, worker, scheduler)


def _source(name: str, parts: Parts) -> SourceTransport:
    """The transport's end over the pools of all ranks."""
    ends = [source_transport(name, memory, parts.identity.incarnation) for memory in parts.memories]
    return ends[0] if len(ends) == 1 else RankedSource(ends)
