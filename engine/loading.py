"""Puts an engine together: model, KV cache, runner. Both services' wiring and the benchmarks start here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.config import EngineConfig, ModelConfig, Settings, resolve_engine_config
from engine.kv_cache import KVCache, kv_bytes
from engine.models.fused import FusedModel, step_shape
from engine.models.int8_loader import load_int8_model
from engine.models.loader import load_model
from engine.models.numerics import numerics_id
from engine.models.transformer import Model, Progress
from engine.runner import Runner
from engine.weights import Checkpoint, checkpoint_id, open_checkpoint
from kernels import dispatch
from tandem.errors import ConfigError

logger = logging.getLogger("engine")

NOT_INVARIANT_WARNING = (
    "compute exact can't keep its promise with the %s kernels: their results' bits depend on the batch, so the same "
    "request may give other tokens. Install g++ or clang++, or set CXX; `tandem doctor` shows what was found."
)


def resolve(settings: Settings, model_config: ModelConfig) -> EngineConfig:
    """`resolve_engine_config` for this machine: compute "auto" is "int8" where that is fast and the model's shape fits.

    Raises ConfigError, also for compute "int8" where it can't be had.
    """
    reason = step_shape(model_config).why_not()
    if dispatch.select().name != "cpp":
        reason = "the C++ kernels are not there"
    if settings.get("compute") == "int8" and reason is not None:
        raise ConfigError(f"compute: int8 can't be had: {reason}")
    fits = reason is None and dispatch.has_fast_int8()
    return resolve_engine_config(settings, model_config, fastest="int8" if fits else "exact")


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded engine. `model_id` and `numerics_id` decide with whom its KV may be shared."""

    model_config: ModelConfig
    engine_config: EngineConfig
    model_id: str
    numerics_id: str
    kv_cache: KVCache
    runner: Runner


BufferFactory = Callable[[int, int], memoryview]
"""(number of blocks, bytes a block) -> their memory, writable."""


def load_engine(
    engine_config: EngineConfig,
    buffer_factory: BufferFactory | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Load the model and reserve the cache; blocking. With `buffer_factory` the caller supplies the cache's memory.

    Raises ModelFormatError for the model, ConfigError for what the machine can't give.
    """
    if engine_config.threads is not None:
        torch.set_num_threads(engine_config.threads)
    implementation = dispatch.select()
    if engine_config.compute == "exact" and not implementation.row_invariant:
        logger.warning(NOT_INVARIANT_WARNING, implementation.name)
    checkpoint = open_checkpoint(engine_config.model)
    try:
        identity = checkpoint_id(checkpoint)
        model = _load_model(checkpoint, identity, engine_config, progress)
        model_config = checkpoint.config
    finally:
        checkpoint.close()
    block_bytes, _ = kv_bytes(model_config, engine_config)
    buffer = buffer_factory(engine_config.num_blocks, block_bytes) if buffer_factory is not None else None
    kv_cache = KVCache(model_config, engine_config, buffer)
    return Engine(
        model_config=model_config,
        engine_config=engine_config,
        model_id=identity,
        numerics_id=numerics_id(engine_config, implementation),
        kv_cache=kv_cache,
        runner=Runner(model, kv_cache, engine_config),
    )


def _load_model(
    checkpoint: Checkpoint, identity: str, engine_config: EngineConfig, progress: Progress | None
) -> Model | FusedModel:
    if engine_config.compute != "int8":
        return load_model(checkpoint, engine_config, progress)
    return load_int8_model(checkpoint, engine_config, progress, identity if engine_config.share_weights else None)
