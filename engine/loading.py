"""Puts an engine together: model, KV cache, runner. Both services' wiring and the benchmarks start here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch

from engine.config import (
    BY_FREE_MEMORY,
    DeviceKind,
    EngineConfig,
    ModelConfig,
    Settings,
    machine_memory,
    resolve_device,
    resolve_engine_config,
)
from engine.device.decode_graphs import CaptureProgress
from engine.device.device import Device, open_gpu
from engine.device.memory import blocks_that_fit
from engine.device.steps import DeviceSteps
from engine.kv_cache import TORCH_DTYPES, DeviceKVCache, KVCache, kv_bytes
from engine.models.device_loader import load_device_model
from engine.models.fused import FusedModel, step_shape
from engine.models.int8_loader import load_int8_model
from engine.models.loader import load_model
from engine.models.numerics import device_numerics_id, numerics_id
from engine.models.transformer import Model, Progress
from engine.parallel.group import Ranks
from engine.parallel.sharding import SPLIT_COMPUTES, check_degree
from engine.runner import Runner
from engine.weights import Checkpoint, checkpoint_id, open_checkpoint
from kernels import dispatch
from kernels.backends import AttentionShape, for_device
from kernels.dispatch import Implementation
from tandem.errors import ConfigError

logger = logging.getLogger("engine")

NOT_INVARIANT_WARNING = (
    "compute exact can't keep its promise with the %s kernels: their results' bits depend on the batch, so the same "
    "request may give other tokens. Install g++ or clang++, or set CXX; `tandem doctor` shows what was found."
)


def resolve(settings: Settings, model_config: ModelConfig, ranks: int = 1) -> EngineConfig:
    """`resolve_engine_config` for this machine: device "auto" is a GPU where torch sees one; on a CPU compute "auto" is
    "int8" where that is fast and the model's shape fits. `ranks` share the model; what is said of memory is of all.

    Raises ConfigError, also for a device or a compute that can't be had.
    """
    if ranks > 1:
        return _resolve_for_ranks(settings, model_config, ranks)
    found = found_device(settings)
    if found == "cuda":
        return resolve_engine_config(settings, model_config, found=found)
    reason = step_shape(model_config).why_not()
    if dispatch.select().name != "cpp":
        reason = "the C++ kernels are not there"
    if settings.get("compute") == "int8" and reason is not None:
        raise ConfigError(f"compute: int8 can't be had: {reason}")
    fits = reason is None and dispatch.has_fast_int8()
    return resolve_engine_config(settings, model_config, fastest="int8" if fits else "exact")


def found_device(settings: Settings) -> DeviceKind:
    """The device that `settings` ask for on this machine. Raises ConfigError for a word that names none."""
    return resolve_device(settings, "cuda" if torch.cuda.is_available() else "cpu")


def _resolve_for_ranks(settings: Settings, model_config: ModelConfig, ranks: int) -> EngineConfig:
    """The fused int8 step is one call for the whole model, so there is nothing between layers to sum; and a GPU's
    products that round to a weight's or a row's largest would round to a part's.
    """
    check_degree(model_config, ranks)
    config = resolve_engine_config(settings, model_config, found=found_device(settings))
    if config.compute not in SPLIT_COMPUTES:
        raise ConfigError(
            f"compute: {config.compute} can't be split over ranks (WORLD_SIZE); use exact or bf16, on a GPU native"
        )
    return config


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded engine. `model_id` and `numerics_id` decide with whom its KV may be shared.

    It may be one rank's of several: `runner` computes with all of them and is rank 0's to use; the others `follow`.
    """

    model_config: ModelConfig
    engine_config: EngineConfig
    model_id: str
    numerics_id: str
    kv_cache: KVCache | DeviceKVCache
    runner: Runner
    degree: int = 1
    """Ranks that share the model."""
    follow: Callable[[], None] | None = None
    """Of other ranks than 0: compute what that sends; returns when it ends in order. The process ends if it doesn't."""


MIRROR_SHARE: Final = 0.25
"""Of the host's memory: for a worker's KV blocks on their way to or from a GPU. There may be two workers."""
BufferFactory = Callable[[int, int], memoryview]
"""(number of blocks, bytes a block) -> their memory, writable."""


def load_engine(
    engine_config: EngineConfig,
    buffer_factory: BufferFactory | None = None,
    progress: Progress | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    transfers: bool = False,
    ranks: Ranks | None = None,
    sends: bool = True,
) -> Engine:
    """Load the model and reserve the cache; blocking. With `buffer_factory` the caller supplies the cache's memory.

    `checkpoint` is one that is open already; it is closed here. `transfers`: see `load_on_device`. With `ranks` this
    process's part of the model and of the cache (`engine.parallel.loading`). Raises ModelFormatError for the model,
    ConfigError for what the machine can't give.
    """
    if engine_config.threads is not None:
        torch.set_num_threads(engine_config.threads)
    opened = checkpoint or open_checkpoint(engine_config.model)
    try:
        identity = checkpoint_id(opened)
        if ranks is not None:
            from engine.parallel.loading import load_rank  # late: it puts together what is here

            return load_rank(
                opened, identity, engine_config, ranks, buffer_factory, progress, transfers=transfers, sends=sends
            )
        if engine_config.device == "cuda":
            return load_on_device(
                opened,
                identity,
                engine_config,
                open_gpu(),
                progress,
                buffer_factory=buffer_factory,
                transfers=transfers,
            )
        return _load_on_cpu(opened, identity, engine_config, buffer_factory, progress)
    finally:
        opened.close()


def _load_on_cpu(
    checkpoint: Checkpoint,
    identity: str,
    engine_config: EngineConfig,
    buffer_factory: BufferFactory | None,
    progress: Progress | None,
) -> Engine:
    implementation = cpu_implementation(engine_config)
    model = _load_model(checkpoint, identity, engine_config, progress)
    block_bytes, _ = kv_bytes(checkpoint.config, engine_config)
    buffer = buffer_factory(engine_config.num_blocks, block_bytes) if buffer_factory is not None else None
    kv_cache = KVCache(checkpoint.config, engine_config, buffer)
    return Engine(
        model_config=checkpoint.config,
        engine_config=engine_config,
        model_id=identity,
        numerics_id=numerics_id(engine_config, implementation),
        kv_cache=kv_cache,
        runner=Runner(model, kv_cache, engine_config),
    )


def cpu_implementation(engine_config: EngineConfig) -> Implementation:
    """What computes here; warns when it can't keep the promise of compute exact."""
    implementation = dispatch.select()
    if engine_config.compute == "exact" and not implementation.row_invariant:
        logger.warning(NOT_INVARIANT_WARNING, implementation.name)
    return implementation


def load_on_device(
    checkpoint: Checkpoint,
    identity: str,
    engine_config: EngineConfig,
    device: Device,
    progress: Progress | None = None,
    capture_progress: CaptureProgress | None = None,
    *,
    buffer_factory: BufferFactory | None = None,
    transfers: bool = False,
) -> Engine:
    """An engine on a GPU, or on what a test has in its place. Raises as `load_engine`.

    `transfers`: blocks have a place on the host too (`engine.device.mirror`), no more of them than that holds. With
    `buffer_factory` it is that memory, and what steps write goes there.
    """
    config = checkpoint.config
    backend = for_device(attention_shape(config, engine_config), device.torch, engine_config.attention)
    model = load_device_model(checkpoint, engine_config, backend, device.torch, progress)
    most = int(machine_memory() * MIRROR_SHARE) if transfers else None
    if engine_config.num_blocks == BY_FREE_MEMORY:
        engine_config = replace(engine_config, num_blocks=blocks_that_fit(model, engine_config, device, most))
    block_bytes, _ = kv_bytes(config, engine_config)
    mirrored = buffer_factory is not None
    buffer = buffer_factory(engine_config.num_blocks, block_bytes) if buffer_factory is not None else None
    kv_cache = DeviceKVCache(config, engine_config, device.torch, buffer)
    steps = DeviceSteps(model, kv_cache, engine_config, device, capture_progress, mirrored=mirrored)
    return Engine(
        model_config=config,
        engine_config=engine_config,
        model_id=identity,
        numerics_id=device_numerics_id(engine_config, backend),
        kv_cache=kv_cache,
        runner=Runner(model, kv_cache, engine_config, steps),
    )


def attention_shape(config: ModelConfig, engine_config: EngineConfig) -> AttentionShape:
    """What attention may know before the first step."""
    return AttentionShape(
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=engine_config.block_size,
        dtype=TORCH_DTYPES[engine_config.dtype],
        kv_dtype=TORCH_DTYPES[engine_config.kv_dtype],
        max_sequences=engine_config.max_sequences,
        max_context=engine_config.context_limit(config),
        windows=tuple(config.layer_window(layer) for layer in range(config.num_layers)),
    )


def _load_model(
    checkpoint: Checkpoint, identity: str, engine_config: EngineConfig, progress: Progress | None
) -> Model | FusedModel:
    if engine_config.compute != "int8":
        return load_model(checkpoint, engine_config, progress)
    return load_int8_model(checkpoint, engine_config, progress, identity if engine_config.share_weights else None)
