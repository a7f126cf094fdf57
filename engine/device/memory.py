"""How many KV blocks a GPU holds: what is free once the model is there, less what a step takes, less a margin.

Where several processes have one GPU, each is told its share (`--gpu-share`): they start at once, and what is free now
may be what another is about to take.

What a step takes is measured: the largest prefill step runs once over a cache of one block, into which padding writes
nothing.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

import numpy as np
import torch

from engine.config import EngineConfig
from engine.device.device import Device
from engine.device.inputs import StepInputs, step_arrays
from engine.device.staging import Staging
from engine.kv_cache import DeviceKVCache
from engine.models.transformer import Model
from engine.placing import Placing
from kernels.backends import HostStep
from tandem.errors import ConfigError

logger = logging.getLogger("engine")
MARGIN_SHARE: Final = 0.03
"""Of all memory: fragmentation, other processes' contexts."""
GRAPHS_SHARE: Final = 0.02
"""Of all memory: graphs' pool and the inputs of each."""
GIB: Final = 1 << 30


def blocks_that_fit(model: Model, engine_config: EngineConfig, device: Device, most: int | None = None) -> int:
    """KV blocks for the free memory, no more than `max_sequences` of the longest context use, nor of `most` bytes.

    Raises ConfigError with the numbers when not even one sequence of the longest context fits.
    """
    step_bytes = measure_step(model, engine_config, device)
    total, free = device.memory.total(), device.memory.free()
    own = int(total * engine_config.gpu_share) - device.memory.held()
    share = MARGIN_SHARE + (GRAPHS_SHARE if engine_config.graphs else 0.0)
    room = min(free, own) - step_bytes - int(total * share)
    block = engine_config.block_bytes(model.config)
    longest = -(-engine_config.context_limit(model.config) // engine_config.block_size)
    blocks = min(engine_config.max_sequences * longest, room // block, *([] if most is None else [most // block]))
    numbers = (
        f"of {total / GIB:.2f} GiB, {free / GIB:.2f} are free with the model loaded ({model.nbytes / GIB:.2f}), this "
        f"process may take {own / GIB:.2f} more (--gpu-share {engine_config.gpu_share:g}), a step of "
        f"{engine_config.max_step_tokens} tokens takes {step_bytes / GIB:.2f}, {total * share / GIB:.2f} are kept as a "
        f"margin, and a sequence of {engine_config.context_limit(model.config)} tokens takes "
        f"{longest * block / GIB:.2f}"
    )
    if blocks < longest:
        raise ConfigError(
            f"{engine_config.model} doesn't fit this GPU: {numbers}. Use a shorter --max-context or --chunk-size, "
            "fewer bits, a larger --gpu-share, or another GPU (CUDA_VISIBLE_DEVICES)"
        )
    logger.info("KV cache of %d blocks (%.2f GiB): %s", blocks, blocks * block / GIB, numbers)
    return blocks


def measure_step(model: Model, engine_config: EngineConfig, device: Device) -> int:
    """Bytes that the largest step takes at its peak, its logits included."""
    cache = DeviceKVCache(model.config, replace(engine_config, num_blocks=1), device.torch)
    device.memory.reset_peak()
    with torch.inference_mode():
        _largest_step(model, engine_config, device, cache)
    device.fence().wait()
    return device.memory.peak()


def _largest_step(model: Model, engine_config: EngineConfig, device: Device, cache: DeviceKVCache) -> None:
    limit = engine_config.context_limit(model.config)
    tokens, sequences = engine_config.max_step_tokens, engine_config.max_sequences
    count = max(-(-tokens // limit), min(sequences, tokens))
    lengths = np.full(count, tokens // count, np.int64)
    lengths[: tokens % count] += 1
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tables = np.zeros((count, -(-int(lengths.max()) // engine_config.block_size)), np.int32)
    zeros = np.zeros(tokens, np.int64)
    placing = Placing(zeros, zeros, np.full(tokens, -1, np.int64), tables, starts, lengths.astype(np.int32))
    arrays = {**step_arrays(placing, None), "rows": starts[1:].astype(np.int64) - 1}
    inputs = StepInputs(Staging(device).put(arrays))
    host = HostStep(placing.query_starts, placing.context_lens, placing.block_tables, limit)
    model.backend.attention.plan(host)
    model.step(inputs.tensors["token_ids"], inputs.meta(host), cache, inputs.tensors["rows"])
