"""A `GraphBackend` on the CPU that is stricter than a GPU: a replay does everything again and compares.

What a real graph freezes must not change between capture and replay: operations, shapes, numbers, addresses of memory
from outside. What it can't hold fails at once: reading results on the host, memory that outlives the step.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kernels.triton.launch import Launch

HOST_READS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "is_nonzero",
}
HARMLESS = {
    "__get__",
    "data_ptr",
    "untyped_storage",
    "stride",
    "storage_offset",
    "is_contiguous",
    "dim",
    "size",
    "numel",
    "element_size",
}


class ForbiddenInGraphError(Exception):
    """What a captured step may not do."""


class Recorder(TorchFunctionMode):
    """Everything that happens inside, as comparable entries."""

    def __init__(self) -> None:
        """Nothing has happened."""
        super().__init__()
        self.trace: list[Any] = []
        self._inner: set[int] = set()
        self._made: list[weakref.ref[torch.Tensor]] = []
        self._in_kernel = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Each call into torch."""
        name = getattr(func, "__name__", str(func))
        if self._in_kernel or name in HARMLESS:
            return func(*args, **(kwargs or {}))
        if name in HOST_READS or (name == "to" and "cpu" in args[1:]):
            raise ForbiddenInGraphError(f"{name} waits for the device")
        entry = (name, self.encode(args), self.encode(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in before:
                self._inner.add(tensor.untyped_storage().data_ptr())
                self._made.append(weakref.ref(tensor))
        self.trace.append(entry)
        return result

    def kernel(self, launch: Launch, run: Callable[[Launch], None]) -> None:
        """Each launch of a kernel; what the interpreter does inside is the device's business."""
        self.trace.append(
            (launch.kernel.__name__, launch.grid, self.encode(launch.args), self.encode(launch.constexprs))
        )
        self._in_kernel = True
        run(launch)
        self._in_kernel = False

    def encode(self, value: Any) -> Any:
        """Tensors from outside by address, those made inside by shape, all else as it is."""
        if isinstance(value, torch.Tensor):
            inner = value.untyped_storage().data_ptr() in self._inner
            return (None if inner else value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if isinstance(value, (tuple, list)):
            return tuple(self.encode(item) for item in value)
        if isinstance(value, dict):
            return {key: self.encode(item) for key, item in value.items()}
        return value

    def check_nothing_is_left(self) -> None:
        """Raises ForbiddenInGraphError when memory of the step is still held."""
        gc.collect()
        left = [made() for made in self._made if made() is not None]
        if left:
            raise ForbiddenInGraphError(f"{len(left)} tensors of the step outlive it")


class RecordingGraphs:
    """See the module's text. `captures` and `replays` count."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`monkeypatch` puts kernels under observation."""
        self.captures = self.replays = 0
        self._recorder: Recorder | None = None
        run = Launch.run

        def watched(launch: Launch) -> None:
            run(launch) if self._recorder is None else self._recorder.kernel(launch, run)

        monkeypatch.setattr(Launch, "run", watched)

    def record(self, body: Callable[[], None]) -> list[Any]:
        """What `body` does. Raises ForbiddenInGraphError."""
        self._recorder = Recorder()
        try:
            with self._recorder:
                body()
            self._recorder.check_nothing_is_left()
            return self._recorder.trace
        finally:
            self._recorder = None

    def capture(self, body: Callable[[], None]) -> RecordedGraph:
        """See `GraphBackend`."""
        self.captures += 1
        body()
        return RecordedGraph(self, body, self.record(body))

    def held_bytes(self) -> int:
        """One MiB a graph."""
        return self.captures << 20


class RecordedGraph:
    """One captured step."""

    def __init__(self, backend: RecordingGraphs, body: Callable[[], None], trace: list[Any]) -> None:
        """`trace` is what every replay must be."""
        self._backend, self._body, self._trace = backend, body, trace

    def replay(self) -> None:
        """Do it again. Raises ForbiddenInGraphError when it differs."""
        self._backend.replays += 1
        trace = self._backend.record(self._body)
        for before, now in zip(self._trace, trace, strict=False):
            if before != now:
                raise ForbiddenInGraphError(f"captured {before}, replayed {now}")
        if len(trace) != len(self._trace):
            raise ForbiddenInGraphError(f"captured {len(self._trace)} operations, replayed {len(trace)}")
