"""A GPU as the engine sees it. Tests have a CPU in its place: the same code, by Triton's interpreter or torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.device.graphs import CudaGraphs, GraphBackend
from tandem.errors import ConfigError


class DeviceMemory(Protocol):
    """What a device says of its memory, in bytes."""

    def total(self) -> int:
        """All of it."""

    def free(self) -> int:
        """What nobody holds, other processes included; what torch keeps for later counts as free."""

    def held(self) -> int:
        """What this process holds, for tensors."""

    def reset_peak(self) -> None:
        """`peak` counts from here."""

    def peak(self) -> int:
        """Most that this process has held at once since `reset_peak`, beyond what it held then."""


class Fence(Protocol):
    """Everything that was launched before it."""

    def wait(self) -> None:
        """Returns when all of it is over."""


class _Over:
    """The fence of a device that has done what it was told when a call returns."""

    def wait(self) -> None:
        """Nothing to wait for."""


class _EventFence:
    def __init__(self) -> None:
        self._event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


class Lane:
    """What is launched in it runs beside the steps."""

    def __init__(self, stream: Any) -> None:
        """None: a device that has done what it was told when a call returns."""
        self._stream = stream

    @contextlib.contextmanager
    def use(self, *, behind_steps: bool) -> Iterator[None]:
        """Launches inside the block go there; with `behind_steps` after all that was launched outside before it."""
        if self._stream is None:
            yield
            return
        if behind_steps:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield


@dataclass(frozen=True, slots=True)
class Device:
    """Where an engine's tensors are."""

    torch: torch.device
    memory: DeviceMemory
    graphs: GraphBackend | None
    """None: nothing is captured."""
    name: str = ""

    def host_buffer(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] on the host that the device copies from and to by itself (pinned)."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.torch.type == "cuda")

    def fence(self) -> Fence:
        """Of all that was launched up to now by this thread, in its lane."""
        return _EventFence() if self.torch.type == "cuda" else _Over()

    def lane(self) -> Lane:
        """A new one."""
        return Lane(torch.cuda.Stream(self.torch) if self.torch.type == "cuda" else None)  # type: ignore[no-untyped-call]

    def pin(self, memory: Tensor) -> bool:
        """Let the device copy from and to `memory` uint8 on the host by itself, until the process ends. False where
        that can't be.
        """
        if self.torch.type != "cuda":
            return True
        api: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(api.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
            return True
        with contextlib.suppress(RuntimeError):  # else the next launch would raise this error
            torch.zeros(1, device=self.torch)
        return False


class CudaMemory:
    """torch's and the driver's counts."""

    def __init__(self) -> None:
        """Of the current device."""
        self._before = 0

    def total(self) -> int:
        """See `DeviceMemory`."""
        return torch.cuda.mem_get_info()[1]

    def free(self) -> int:
        """See `DeviceMemory`."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def held(self) -> int:
        """See `DeviceMemory`."""
        return torch.cuda.memory_reserved()

    def reset_peak(self) -> None:
        """See `DeviceMemory`."""
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        """See `DeviceMemory`."""
        return torch.cuda.max_memory_allocated() - self._before


def open_gpu() -> Device:
    """The first GPU that torch sees. Raises ConfigError without one."""
    if not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch sees no GPU; use --device cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    return Device(device, CudaMemory(), CudaGraphs(), torch.cuda.get_device_name())
