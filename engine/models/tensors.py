"""What loaders of every kind share: reading tensors with their shapes checked, and keeping count of what was used."""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.models.transformer import Progress
from engine.weights.checkpoint import Checkpoint, kv_scale_names
from kernels.coded import CodedWeights
from kernels.int8 import GroupWeights
from kernels.kv_codes import FixedScales
from kernels.memory import ALIGNMENT
from tandem.errors import ModelFormatError

_UNUSED: Final = re.compile(r".*rotary_emb\.inv_freq")
"""Tensors that old checkpoints hold and nobody needs."""
EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
MAX_LOADERS: Final = 8


@contextlib.contextmanager
def _one_thread_each() -> Iterator[int]:
    """How many threads may load at once; inside, each packs alone.

    Layers side by side beat threads within each: most tensors are small, and waiting OpenMP threads spin.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(threads, MAX_LOADERS)
    finally:
        torch.set_num_threads(threads)


def _trim_heap() -> None:
    """Give back what the loading threads' heaps keep (130 of 670 MB for SmolLM2-135M); glibc only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def fused_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name -> [N, K] of every weight that loaders pack: layer by layer qkv, output, gate_up, down; then head."""
    width, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = {
        "qkv": (query + 2 * key, width),
        "output": (width, query),
        "gate_up": (2 * inner, width),
        "down": (width, inner),
    }
    shapes = {f"{index}.{name}": shape for index in range(config.num_layers) for name, shape in layer.items()}
    return {**shapes, "head": (config.vocab_size, width)}


def most_bytes(config: ModelConfig, panels: Callable[[int, int], int]) -> int:
    """Bytes of all packed weights at most, each at an aligned place; `panels` gives those of a weight [N, K]."""
    return sum(panels(n, k) + ALIGNMENT for n, k in fused_shapes(config).values())


L = TypeVar("L")
R = TypeVar("R")


def load_side_by_side(
    layer: Callable[[int], L], rest: Callable[[], R], num_layers: int, progress: Progress | None
) -> tuple[tuple[L, ...], R]:
    """`layer(0)`, `layer(1)`, ... and what `rest`, the largest part, gives: as many at once as there are threads."""
    layers: list[L] = []

    def load(index: int) -> L:
        loaded = layer(index)
        _trim_heap()  # else each thread's heap keeps what its largest layer took
        return loaded

    with _one_thread_each() as workers, ThreadPoolExecutor(workers) as pool:
        largest = pool.submit(rest)
        for one in pool.map(load, range(num_layers)):
            layers.append(one)
            if progress is not None:
                progress(len(layers), num_layers)
        others = largest.result()
    _trim_heap()
    return tuple(layers), others


class TensorSource:
    """Reads a checkpoint's tensors for one loader, whose threads may share it."""

    def __init__(self, checkpoint: Checkpoint, path: str) -> None:
        """`path` is for messages."""
        self._checkpoint = checkpoint
        self._path = path
        self.coding = checkpoint.coding
        """See `Checkpoint.coding`."""
        self._used: set[str] = set()

    def vector(self, name: str, length: int) -> Tensor:
        """A norm or bias, as its own float32 memory."""
        vector = self.take(name, (length,)).to(torch.float32, copy=True)
        self._checkpoint.release(name)
        return vector

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor as the checkpoint gives it. Raises ModelFormatError when it is missing or of another shape."""
        self._check(name, shape)
        return self._checkpoint.tensor(name)

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """As `take`, but nothing is read: somebody else has read it."""
        self._check(name, shape)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._checkpoint.shape(name)
        if found != shape:
            raise ModelFormatError(f"{self._path}: tensor {name} has shape {found}; expected {shape}")
        self._used.add(name)

    def kv_scales(self, attention: str, kv_dtype: str) -> FixedScales | None:
        """The scales of keys and values that a checkpoint has for a layer's cache; None without, or where that holds
        something else than they are for. Raises ModelFormatError for scales that are no positive numbers, or just one.
        """
        names = kv_scale_names(attention, self._checkpoint.names())
        there = [name for name in names if name in self._checkpoint.names()]
        if len(there) == 1:
            missing = next(name for name in names if name not in there)
            raise ModelFormatError(f"{self._path}: tensor {missing} is missing; {there[0]} is there")
        if not there or kv_dtype != self._checkpoint.kv_scales:
            self._used.update(there)
            return None
        return self._scale(names[0]), self._scale(names[1])

    def _scale(self, name: str) -> float:
        shape = self._checkpoint.shape(name)
        scale = float(self.take(name, shape)) if math.prod(shape) == 1 else math.nan
        if not 0 < scale < math.inf:
            raise ModelFormatError(f"{self._path}: tensor {name} must be one positive number; its shape is {shape}")
        return scale

    def refuse_unused(self) -> None:
        """A tensor that nothing reads means another network under a known name: its answers would be nonsense."""
        unused = [n for n in self._checkpoint.names() if n not in self._used and not _UNUSED.fullmatch(n)]
        if unused:
            more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
            architecture = self._checkpoint.config.architecture
            raise ModelFormatError(f"{self._path}: {architecture} has no use for tensor {unused[0]}{more}")

    def coded(self, name: str, shape: tuple[int, int]) -> CodedWeights | None:
        """The tensor's own codes, whatever their format; None: `take` it."""
        self._check(name, shape)
        return self._checkpoint.coded(name)

    def codes(self, name: str, shape: tuple[int, int]) -> GroupWeights | None:
        """The tensor's own codes, where the file holds such as `kernels.int8` takes; None: `take` it."""
        self._check(name, shape)
        return self._checkpoint.codes(name)

    def use(self, name: str) -> None:
        """Nobody reads this tensor, and that is fine."""
        self._used.add(name)

    def release(self, name: str) -> None:
        """See `Checkpoint.release`."""
        self._checkpoint.release(name)
