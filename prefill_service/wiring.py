"""What is a prefill worker's own in its process (`worker.process`): memory that the transports can give away."""

from __future__ import annotations

from engine.loading import Engine
from kv_transfer.pool import LocalPool, PoolMemory, SharedPool
from prefill_service.assembly import Parts, assemble
from prefill_service.config import SchedulerConfig
from worker import loading, process
from worker.flags import Flags


def load(flags: Flags) -> tuple[Engine, PoolMemory]:
    """Load the model over memory that the transports can give away, and warm it up; blocking. Raises ConfigError."""
    pools: list[PoolMemory] = []

    def make_pool(num_blocks: int, block_bytes: int) -> memoryview:
        make = SharedPool if "shm" in flags.transports else LocalPool
        pool: PoolMemory = make(num_blocks, block_bytes)
        pools.append(pool)
        return pool.buffer

    engine = loading.load(flags, make_pool)
    return engine, pools[0]


def parts_of(engine: Engine, memory: PoolMemory, flags: Flags, metrics_address: str) -> Parts:
    """A loaded engine's identity and limits."""
    identity = loading.identity_of(engine, flags, metrics_address)
    scheduler = SchedulerConfig(**loading.limits_of(engine, identity))
    return Parts(identity, scheduler, engine.runner, memory, engine.engine_config.prefix_cache)


async def serve(flags: Flags) -> int:
    """The whole life of the process. Returns its exit code; raises ConfigError at start."""
    return await process.serve(
        "prefill",
        flags,
        lambda: load(flags),
        lambda loaded, address, metrics, tls: assemble(
            parts_of(*loaded, flags, address), flags.listen, metrics, tls, flags.health
        ),
    )
