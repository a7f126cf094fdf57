"""What is a decode worker's own in its process (`worker.process`)."""

from __future__ import annotations

from dataclasses import replace

from decode_service.assembly import Parts, assemble
from decode_service.config import SchedulerConfig
from decode_service.flags import Flags
from engine.loading import Engine
from worker import loading, process


def parts_of(engine: Engine, flags: Flags, metrics_address: str) -> Parts:
    """A loaded engine's identity and limits."""
    identity = loading.identity_of(engine, flags, metrics_address)
    identity = replace(identity, convert_kv_dtype=flags.convert_kv_dtype)
    scheduler = SchedulerConfig(**loading.limits_of(engine, identity), mixed_prefill_tokens=flags.mixed_prefill_tokens)
    return Parts(identity, scheduler, engine.runner, engine.kv_cache.blocks_view(), engine.engine_config.prefix_cache)


async def serve(flags: Flags) -> int:
    """The whole life of the process. Returns its exit code; raises ConfigError at start."""
    return await process.serve(
        "decode",
        flags,
        lambda: loading.load(flags),
        lambda engine, address, metrics, tls: assemble(
            parts_of(engine, flags, address), flags.listen, metrics, tls, flags.health
        ),
    )
