"""What is a decode worker's own in its process (`worker.process`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from decode_service.assembly import Parts, assemble
from decode_service.config import SchedulerConfig
from decode_service.flags import MIXED_PREFILL_TOKENS, Flags
from decode_service.speculation.calibration import measure
from decode_service.speculation.config import SpeculationConfig
from decode_service.speculation.model_proposers import with_models
from engine.loading import Engine
from engine.parallel.group import Ranks
from tandem.errors import ConfigError
from worker import loading, process
from worker.pools import Pools
from worker.ranks import follow, joined


@dataclass(frozen=True, slots=True)
class Loaded:
    """A warm engine, and seconds of its steps by their rows where that matters."""

    engine: Engine
    costs: dict[int, float]
    speculation: SpeculationConfig
    other_blocks: tuple[memoryview, ...] = ()
    """With several ranks: the KV memory of rank 1 and up."""


def speculation_of(engine: Engine, flags: Flags) -> SpeculationConfig:
    """A GPU's decode steps are launched ahead, those that verify drafts are not: it has none unless asked for."""
    unasked = flags.automatic_speculation and engine.engine_config.device == "cuda"
    return SpeculationConfig() if unasked else flags.speculation


def mixed_prefill_tokens(flags: Flags, engine: Engine) -> int:
    """What was asked for, or what suits the engine's device."""
    asked = flags.mixed_prefill_tokens
    return MIXED_PREFILL_TOKENS[engine.engine_config.device] if asked is None else asked


def load(flags: Flags, ranks: Ranks | None = None) -> Loaded:
    """Load the model; blocking. Raises ConfigError."""
    if ranks is not None and flags.speculation.models:
        names = ", ".join(flags.speculation.models)
        raise ConfigError(f"--speculation: {names} can't draft with several ranks (WORLD_SIZE); ngram and suffix can")
    pools = Pools(ranks)
    engine = loading.load(flags, pools.make if ranks is not None else None, ranks, sends=False)
    return replace(_measured(engine, flags), other_blocks=tuple(pool.buffer for pool in pools.all[1:]))


def _measured(engine: Engine, flags: Flags) -> Loaded:
    """With what drafts, and what steps cost where that matters."""
    config = engine.engine_config
    speculation = with_models(speculation_of(engine, flags), flags, engine)
    if not speculation.proposers:
        return Loaded(engine, {}, speculation)
    most = config.context_limit(engine.model_config)
    return Loaded(engine, measure(engine.runner, config.num_blocks, config.block_size, most), speculation)


def parts_of(
    engine: Engine,
    flags: Flags,
    metrics_address: str,
    step_costs: Mapping[int, float] | None = None,
    speculation: SpeculationConfig | None = None,
    other_blocks: tuple[memoryview, ...] = (),
) -> Parts:
    """A loaded engine's identity and limits. `step_costs`: seconds of its steps by their rows; `speculation`: with the
    proposers that need a model; `other_blocks`: see `Loaded`.
    """
    speculation = speculation_of(engine, flags) if speculation is None else speculation
    identity = loading.identity_of(engine, flags, metrics_address)
    names = tuple(proposer.name for proposer in speculation.proposers)
    identity = replace(identity, convert_kv_dtype=flags.convert_kv_dtype, proposers=names)
    gpu = engine.engine_config.device == "cuda"
    scheduler = SchedulerConfig(
        **loading.limits_of(engine, identity),
        mixed_prefill_tokens=mixed_prefill_tokens(flags, engine),
        # A GPU's memory is shared out with the logits of one row a sequence in mind; as many more are in its margin.
        max_drafts=identity.max_sequences if gpu else None,
    )
    return Parts(
        identity,
        scheduler,
        engine.runner,
        engine.kv_cache.blocks_view(),
        engine.engine_config.prefix_cache,
        speculation=speculation,
        step_costs=step_costs or {},
        other_blocks=other_blocks,
    )


async def serve(flags: Flags) -> int:
    """The whole life of the process. Returns its exit code; raises ConfigError at start."""
    async with joined(flags) as ranks:
        if ranks is not None and not ranks.leads:
            return follow(flags, ranks, sends=False)
        return await process.serve(
            "decode",
            flags,
            lambda: load(flags, ranks),
            lambda loaded, address, metrics, tls: assemble(
                parts_of(loaded.engine, flags, address, loaded.costs, loaded.speculation, loaded.other_blocks),
                flags.listen,
                metrics,
                tls,
                flags.health,
            ),
        )
