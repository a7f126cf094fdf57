"""The paged KV cache: one piece of memory that may be shared with other processes, and tensors over it; or in a GPU's.

Life cycle: sized by `kv_bytes` -> built over the caller's buffer or memory of its own, no page touched -> written by
steps and by transfers -> dropped. Who may write which block is the block pool's business, not the cache's.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from kernels.kv_codes import is_quantized
from kernels.kv_order import PLAIN, best_order
from kernels.memory import advise_huge
from tandem.errors import ConfigError

TORCH_DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8_e4m3": torch.float8_e4m3fn,
}


def kv_bytes(model_config: ModelConfig, engine_config: EngineConfig) -> tuple[int, int]:
    """(bytes of one block over all layers, bytes of the whole pool)."""
    block = engine_config.block_bytes(model_config)
    return block, block * engine_config.num_blocks


def kv_shape(model_config: ModelConfig, engine_config: EngineConfig) -> tuple[int, ...]:
    """[num_blocks, layers, 2, kv_heads, block_size, head_dim]."""
    heads, dim = model_config.num_kv_heads, model_config.head_dim
    return engine_config.num_blocks, model_config.num_layers, 2, heads, engine_config.block_size, dim


def _elements_and_scales(
    blocks: Tensor, model_config: ModelConfig, engine_config: EngineConfig
) -> tuple[Tensor, Tensor | None]:
    """What uint8 [num_blocks, block_bytes] hold, as views: elements, and the scales of codes behind them."""
    dtype, shape = TORCH_DTYPES[engine_config.kv_dtype], kv_shape(model_config, engine_config)
    data_bytes = engine_config.block_size * model_config.kv_elements_per_token * dtype.itemsize
    elements = blocks[:, :data_bytes].view(dtype).view(shape)
    if not is_quantized(dtype):
        return elements, None
    at = engine_config.scales_at(model_config)
    return elements, blocks[:, at:].view(torch.float32).view(shape[:-1])


class DeviceKVCache:
    """The cache as one piece of a GPU's memory, zeroed: what padding reads must be finite. As `KVCache` has it, byte
    for byte, so that blocks go to the host and come from there as they are.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        engine_config: EngineConfig,
        device: torch.device,
        buffer: memoryview | None = None,
    ) -> None:
        """`buffer`: the host's memory for the same blocks, see `engine.device.mirror`; None: reserved when asked for.

        Raises ConfigError when the GPU hasn't so much memory.
        """
        self.order = PLAIN
        self._mirror = buffer
        self.block_bytes, total = kv_bytes(model_config, engine_config)
        shape = (engine_config.num_blocks, self.block_bytes)
        try:
            self.blocks = torch.zeros(shape, dtype=torch.uint8, device=device)
            """All bytes."""
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{total} bytes of KV blocks don't fit the GPU's free memory; use fewer blocks (--num-blocks), or tell "
                "each process of this GPU its --gpu-share"
            ) from error
        self.tensor, self.scales = _elements_and_scales(self.blocks, model_config, engine_config)

    def layer(self, index: int) -> Tensor:
        """K and V of one layer: a view [num_blocks, 2, kv_heads, block_size, head_dim]."""
        return self.tensor[:, index]

    def layer_scales(self, index: int) -> Tensor | None:
        """Those of one layer: a view [num_blocks, 2, kv_heads, block_size]; None where the dtype has none."""
        return None if self.scales is None else self.scales[:, index]

    def blocks_view(self) -> memoryview:
        """The host's memory for the same blocks, uint8 [num_blocks * block_bytes]: no page of it is touched here."""
        if self._mirror is None:
            self._mirror = _reserve(self.blocks.nbytes)
        return self._mirror.cast("B")


class KVCache:
    """`tensor` [num_blocks, layers, 2, kv_heads, block_size, head_dim] of `kv_dtype`; a block's bytes are contiguous.

    `order` is that of a block's keys and values (`kernels.kv_order`); the shape is the same with either. `scales`
    float32 [num_blocks, layers, 2, kv_heads, block_size] of codes (`kernels.kv_codes`) stand in each block behind its
    elements; other dtypes have none.
    """

    def __init__(
        self, model_config: ModelConfig, engine_config: EngineConfig, buffer: memoryview | None = None
    ) -> None:
        """`buffer` is writable and holds exactly `kv_bytes(...)[1]` bytes; None: anonymous memory.

        Raises ConfigError when the size differs or the memory can't be had.
        """
        dtype = TORCH_DTYPES[engine_config.kv_dtype]
        fused = engine_config.compute == "int8"  # only the fused step reads paired blocks
        self.order = best_order(dtype, engine_config.block_size, model_config.head_dim) if fused else PLAIN
        self.block_bytes, total = kv_bytes(model_config, engine_config)
        self._memory = _reserve(total) if buffer is None else buffer
        if self._memory.nbytes != total:
            raise ConfigError(f"a KV cache of {total} bytes doesn't fit a buffer of {self._memory.nbytes} bytes")
        self.blocks = torch.frombuffer(self._memory, dtype=torch.uint8).view(-1, self.block_bytes)
        """All bytes: uint8 [num_blocks, block_bytes]."""
        self.tensor, self.scales = _elements_and_scales(self.blocks, model_config, engine_config)

    def layer(self, index: int) -> Tensor:
        """K and V of one layer: a view [num_blocks, 2, kv_heads, block_size, head_dim]."""
        return self.tensor[:, index]

    def layer_scales(self, index: int) -> Tensor | None:
        """Those of one layer: a view [num_blocks, 2, kv_heads, block_size]; None where the dtype has none."""
        return None if self.scales is None else self.scales[:, index]

    def blocks_view(self) -> memoryview:
        """All blocks' bytes: uint8 [num_blocks * block_bytes], writable."""
        return self._memory.cast("B")


def _reserve(size: int) -> memoryview:
    """Anonymous pages, taken from the machine when first written."""
    try:
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError, ctypes.ArgumentError) as error:
        raise ConfigError(
            f"can't reserve {size} bytes for KV blocks: {error}; use fewer blocks (--num-blocks)"
        ) from error
    advise_huge(pages)
    return memoryview(pages)
