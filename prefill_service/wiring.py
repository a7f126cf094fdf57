"""What is a prefill worker's own in its process (`worker.process`): memory that the transports can give away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.loading import Engine
from engine.parallel.group import Ranks
from kv_transfer.pool import PoolMemory
from prefill_service.assembly import Parts, assemble
from prefill_service.config import SchedulerConfig
from worker import loading, process
from worker.flags import Flags
from worker.pools import Pools
from worker.ranks import follow, joined


def load(flags: Flags, ranks: Ranks | None = None) -> tuple[Engine, Sequence[PoolMemory]]:
    """Load the model over memory that the transports can give away, and warm it up; blocking. The pools are one a rank.
    Raises ConfigError.
    """
    pools = Pools(ranks, shared="shm" in flags.transports)
    return loading.load(flags, pools.make, ranks), pools.all


def parts_of(engine: Engine, pools: Sequence[PoolMemory], flags: Flags, metrics_address: str) -> Parts:
    """A loaded engine's identity and limits."""
    identity = loading.identity_of(engine, flags, metrics_address)
    scheduler = SchedulerConfig(**loading.limits_of(engine, identity))
    memory, *others = pools
    return Parts(identity, scheduler, engine.runner, memory, engine.engine_config.prefix_cache, tuple(others))


async def serve(flags: Flags) -> int:
    """The whole life of the process. Returns its exit code; raises ConfigError at start.

    No decode steps are captured: there will be none.
    """
    flags = replace(flags, engine={**flags.engine, "graphs": False})
    async with joined(flags) as ranks:
        if ranks is not None and not ranks.leads:
            return follow(flags, ranks, sends=True)
        return await process.serve(
            "prefill",
            flags,
            lambda: load(flags, ranks),
            lambda loaded, address, metrics, tls: assemble(
                parts_of(*loaded, flags, address), flags.listen, metrics, tls, flags.health
            ),
        )
