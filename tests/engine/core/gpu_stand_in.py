"""A CPU in a GPU's place: the engine's device path with Triton's interpreter or torch in its kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.device.device import Device
from engine.loading import Engine, load_on_device
from engine.weights import checkpoint_id, open_checkpoint


@dataclass
class Memory:
    """A `DeviceMemory` that says what a test wants."""

    total_bytes: int = 1 << 30
    free_bytes: int = 1 << 30
    peak_bytes: int = 0
    held_bytes: int = 0
    asked: list[str] = field(default_factory=list)

    def total(self) -> int:
        """See `DeviceMemory`."""
        return self.total_bytes

    def free(self) -> int:
        """See `DeviceMemory`."""
        return self.free_bytes

    def held(self) -> int:
        """See `DeviceMemory`."""
        return self.held_bytes

    def reset_peak(self) -> None:
        """See `DeviceMemory`."""
        self.asked.append("reset")

    def peak(self) -> int:
        """See `DeviceMemory`."""
        self.asked.append("peak")
        return self.peak_bytes


def device(graphs: Any = None, memory: Memory | None = None) -> Device:
    """The CPU."""
    return Device(torch.device("cpu"), memory or Memory(), graphs, "stand-in")


def load(
    path: Path, on: Device | None = None, *, buffer_factory: Any = None, transfers: bool = False, **settings: Any
) -> Engine:
    """The engine's device path over the model at `path`."""
    sizes: dict[str, Any] = {"num_blocks": 32, "block_size": 4, "max_sequences": 8, "max_step_tokens": 64, **settings}
    dtype, compute = sizes.pop("dtype", "float32"), sizes.pop("compute", "native")
    kv_dtype = sizes.pop("kv_dtype", dtype)
    config = EngineConfig(str(path), device="cuda", compute=compute, dtype=dtype, kv_dtype=kv_dtype, **sizes)
    checkpoint = open_checkpoint(path)
    try:
        mirror = {"buffer_factory": buffer_factory, "transfers": transfers}
        return load_on_device(checkpoint, checkpoint_id(checkpoint), config, on or device(), **mirror)
    finally:
        checkpoint.close()
