"""Puts one rank's engine together. `engine.loading.load_engine` comes here when there are several."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from typing import Any

from engine.config import BY_FREE_MEMORY, EngineConfig, machine_memory
from engine.device.device import Device, open_gpu
from engine.device.memory import blocks_that_fit
from engine.kv_cache import DeviceKVCache, KVCache, kv_bytes
from engine.loading import MIRROR_SHARE, BufferFactory, Engine, attention_shape, cpu_implementation
from engine.models.device_loader import load_device_model
from engine.models.loader import load_model
from engine.models.numerics import device_numerics_id, numerics_id
from engine.models.transformer import Progress
from engine.parallel.checkpoint import RankCheckpoint
from engine.parallel.device_steps import FollowingDeviceSteps, LeadingDeviceSteps
from engine.parallel.group import Ranks
from engine.parallel.layers import over_ranks
from engine.parallel.steps import LeadingSteps, follow
from engine.runner import Runner
from engine.weights import Checkpoint
from kernels.backends import for_device


def load_rank(
    checkpoint: Checkpoint,
    identity: str,
    engine_config: EngineConfig,
    ranks: Ranks,
    buffer_factory: BufferFactory | None = None,
    progress: Progress | None = None,
    *,
    transfers: bool = False,
    sends: bool = True,
) -> Engine:
    """This rank's part of the model and of the cache; blocking. Returns on rank 0 when all ranks have theirs.

    `transfers` as `engine.loading.load_on_device`; `sends`: what a GPU's steps write goes to `buffer_factory`'s memory.
    Raises as `load_engine`, and ConfigError for ranks that end meanwhile or load something else.
    """
    part = RankCheckpoint(checkpoint, ranks.rank, ranks.size)
    if engine_config.device == "cuda":
        mirrored = sends and buffer_factory is not None
        engine = load_rank_on_device(
            part, engine_config, ranks, open_gpu(), checkpoint, buffer_factory, transfers=transfers, mirrored=mirrored
        )
    else:
        engine = _load_on_cpu(part, engine_config, ranks, checkpoint, buffer_factory, progress)
    engine = replace(engine, model_id=identity, degree=ranks.size)
    ranks.agree(_digest(identity, engine.numerics_id, engine.engine_config))
    ranks.ready()
    return engine


def _load_on_cpu(
    part: RankCheckpoint,
    engine_config: EngineConfig,
    ranks: Ranks,
    whole: Checkpoint,
    buffer_factory: BufferFactory | None,
    progress: Progress | None,
) -> Engine:
    vocabulary = whole.config.vocab_size
    model = over_ranks(load_model(part, engine_config, progress), ranks, vocabulary)
    kv_cache = KVCache(part.config, engine_config, _buffer(part, engine_config, buffer_factory))
    steps = LeadingSteps(model, kv_cache, engine_config, ranks, vocabulary)
    return Engine(
        model_config=whole.config,
        engine_config=engine_config,
        model_id="",
        numerics_id=numerics_id(engine_config, cpu_implementation(engine_config), ranks.size),
        kv_cache=kv_cache,
        runner=Runner(model, kv_cache, engine_config, steps),
        follow=lambda: follow(model, kv_cache, ranks),
    )


def load_rank_on_device(
    part: RankCheckpoint,
    engine_config: EngineConfig,
    ranks: Any,
    device: Device,
    whole: Checkpoint,
    buffer_factory: BufferFactory | None = None,
    *,
    transfers: bool = False,
    mirrored: bool = False,
) -> Engine:
    """The same on a GPU, or on what a test has in its place, with `ranks` as `Ranks`: not agreed on yet."""
    config, vocabulary = part.config, whole.config.vocab_size
    backend = for_device(attention_shape(config, engine_config), device.torch, engine_config.attention)
    # Not as codes: those of 8 bits have products that round rows, of which a rank has parts.
    loaded = load_device_model(part, engine_config, backend, device.torch, codes=False)
    model = over_ranks(loaded, ranks, vocabulary)
    ranks.agree(_digest(str(vocabulary), backend.attention.numerics, engine_config))  # before all compute together
    if engine_config.num_blocks == BY_FREE_MEMORY:
        most = int(machine_memory() * MIRROR_SHARE) // ranks.size if transfers else None
        blocks = ranks.least(blocks_that_fit(model, engine_config, device, most))
        engine_config = replace(engine_config, num_blocks=blocks)
    kv_cache = DeviceKVCache(config, engine_config, device.torch, _buffer(part, engine_config, buffer_factory))
    kind = LeadingDeviceSteps if ranks.leads else FollowingDeviceSteps
    steps = kind(model, kv_cache, engine_config, device, ranks, vocabulary, mirrored=mirrored)
    return Engine(
        model_config=whole.config,
        engine_config=engine_config,
        model_id="",
        numerics_id=device_numerics_id(engine_config, backend),
        kv_cache=kv_cache,
        runner=Runner(model, kv_cache, engine_config, steps),
        follow=steps.follow if isinstance(steps, FollowingDeviceSteps) else None,
    )


def _buffer(
    part: RankCheckpoint, engine_config: EngineConfig, buffer_factory: BufferFactory | None
) -> memoryview | None:
    if buffer_factory is None:
        return None
    block_bytes, _ = kv_bytes(part.config, engine_config)
    return buffer_factory(engine_config.num_blocks, block_bytes)


def _digest(identity: str, numerics: str, engine_config: EngineConfig) -> bytes:
    """What all ranks must have alike."""
    alike = (identity, numerics, sorted(asdict(engine_config).items()))
    return hashlib.sha256(repr(alike).encode()).digest()
