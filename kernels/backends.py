"""By which kernels an engine computes its steps: decided once, at start, for its device.

`Operations` has what a step does beside its products, `Attention` what reads the paged cache. An engine holds one of
each and never asks again:

    device  operations           attention
    cpu     cpp, torch           cpp, torch (`kernels.dispatch` decides between them)
    cuda    triton, torch        `kernels.attentions.ATTENTIONS`

TANDEM_GPU_KERNELS and TANDEM_ATTENTION name one; without them the first of the list is taken that is there. "cuda" is
whatever torch calls so: AMD's chips too.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.kv_codes import FixedScales
from kernels.sampling import Draw
from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class HostStep:
    """What the host knows of a step's lengths: for planners and grids, without reading the device."""

    query_starts: npt.NDArray[np.int32]
    """[S + 1], as `AttentionMeta.query_starts`."""
    context_lens: npt.NDArray[np.int32]
    """[S]; 0 for a row of padding."""
    block_tables: npt.NDArray[np.int32]
    """[S, B]."""
    max_context: int
    """No context is longer; with a captured graph: ever will be."""
    bucket: int | None = None
    """Rows of the captured step that this one is run, captured or replayed as; None: an eager step."""

    @property
    def one_each(self) -> bool:
        """True when every sequence has one row: a decode step."""
        return len(self.query_starts) - 1 == int(self.query_starts[-1])


class AttentionMeta(Protocol):
    """A step as attention reads it on the device; `engine.models.meta.ForwardMeta` is one."""

    @property
    def block_tables(self) -> Tensor: ...
    @property
    def query_starts(self) -> Tensor: ...
    @property
    def context_lens(self) -> Tensor: ...
    @property
    def host(self) -> HostStep | None: ...


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What an attention backend may know of the model and the cache before the first step."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    """Of queries and results."""
    kv_dtype: torch.dtype
    max_sequences: int
    max_context: int
    windows: tuple[int | None, ...] = ()
    """The sliding window of each layer."""
    soft_cap: float | None = None
    """c: scores become c * tanh(score / c)."""

    @property
    def scale(self) -> float:
        """Of all scores."""
        return float(self.head_dim**-0.5)


class Attention(Protocol):
    """Causal grouped-query attention over the paged cache. One engine's, called from one thread."""

    @property
    def name(self) -> str:
        """As in --attention, TANDEM_ATTENTION and `tandem doctor`."""

    @property
    def numerics(self) -> str:
        """What decides result bits, for numerics ids."""

    @property
    def capturable(self) -> bool:
        """Whether `run` may be part of a captured graph."""

    def plan(self, step: HostStep) -> None:
        """Before every step, captured or not: host work that all layers share. Never captured itself, may launch.

        With `step.bucket` set, what `run` reads must lie in the same buffers for each step of that bucket.
        """

    def run(
        self,
        q: Tensor,
        kv_layer: Tensor,
        meta: AttentionMeta,
        scale: float,
        window: int | None,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """q [T, Hq, D] -> [T, Hq, D] for the step planned last. kv_layer [blocks, 2, Hkv, block_size, D]; codes of 8
        bits come with their scales.

        Waits for nothing and reads nothing back when `capturable`.
        """


@dataclass(frozen=True, slots=True, eq=False)
class DrawResults:
    """Draws that were launched, on the device; `kernels.draw_settings.drawn_of` reads them once they are on the CPU."""

    values: Tensor
    """int32 [3, N]: tokens, or NOT_FINITE or ALL_BANNED of `kernels.sampling`; the bits of log probabilities; those of
    normalisers."""
    top_ids: Tensor
    """int32 [N, most]."""
    top_logprobs: Tensor
    """float32 [N, most]."""


class Operations(Protocol):
    """What a step does beside products and attention. Tensors are on one device; activations have one dtype."""

    @property
    def name(self) -> str:
        """As in TANDEM_GPU_KERNELS and `tandem doctor`."""

    @property
    def numerics(self) -> str:
        """What decides result bits, for numerics ids."""

    @property
    def capturable(self) -> bool:
        """Whether all of these may be part of a captured graph, and take rows of padding (slot -1)."""

    def embedding(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of table [V, W] by ids int64 [T]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        """As `kernels.norm.rms_norm`: with `residual`, residual += x in place and the sum is normed."""

    def rms_norm_heads(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        """As `kernels.norm.rms_norm_heads`."""

    def rope_and_store(
        self,
        qkv: Tensor,
        positions: Tensor,
        slots: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv_layer: Tensor,
        num_heads: int,
        num_kv_heads: int,
        *,
        interleaved: bool = False,
        kv_scales: Tensor | None = None,
        fixed_scales: FixedScales | None = None,
    ) -> Tensor:
        """As `kernels.rope.rope_and_store`: q [T, Hq, D]; keys and values go to their slots."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 * I] -> [T, I]."""

    def copy_blocks(self, cache: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """As `kernels.blocks.copy_blocks`: one after the other."""

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> DrawResults:
        """As `kernels.sampling.draw_tokens`, but ids that draws name are in the vocabulary, draws that edit logits have
        rows of their own, and logits are edited in place. Not waited for when `capturable`."""

    def sample(self, logits: Tensor, settings: Mapping[str, Tensor]) -> Tensor:
        """`DrawResults.values` for draws without edits and alternatives; `settings` has the columns of
        `kernels.draw_settings`. Only where `capturable`."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What one engine computes with."""

    operations: Operations
    attention: Attention

    @property
    def capturable(self) -> bool:
        """Whether a decode step may be captured."""
        return self.operations.capturable and self.attention.capturable


@dataclass(frozen=True, slots=True)
class Choice:
    """One entry of the list below: where it is, and whether it can be had."""

    name: str
    module: str
    make: str
    """A callable of `module`, of nothing."""
    needs: Callable[[], str | None]
    """None when it can be used here, else why not."""

    def load(self) -> Callable[..., Any]:
        """Import it: only what is chosen is imported."""
        made: Callable[..., Any] = getattr(importlib.import_module(self.module), self.make)
        return made


def _triton_missing() -> str | None:
    """Why triton can't be used; importing it takes a second, so the import is not tried."""
    return None if importlib.util.find_spec("triton") is not None else "triton is not installed"


def _never() -> str | None:
    return None


OPERATIONS: Final[list[Choice]] = [
    Choice("triton", "kernels.triton.operations", "TritonOperations", _triton_missing),
    Choice("torch", "kernels.torch_operations", "TorchOperations", _never),
]
"""Best first."""


def for_cpu() -> Backend:
    """The CPU's: C++ or torch, as `kernels.dispatch.select` says at each call."""
    from kernels.cpu_operations import CpuAttention, CpuOperations

    return Backend(CpuOperations(), CpuAttention())


def for_device(shape: AttentionShape, device: torch.device, attention: str = "auto") -> Backend:
    """Those of a GPU: operations as TANDEM_GPU_KERNELS says, attention as `kernels.attentions.attention_for` finds it.

    Raises ConfigError for what can't be had.
    """
    from kernels.attentions import attention_for

    operations = choose("TANDEM_GPU_KERNELS", OPERATIONS)
    return Backend(operations.load()(), attention_for(shape, device, attention))


def choose(variable: str, choices: Sequence[Choice]) -> Choice:
    """The entry that the environment variable names, or the first that can be had. Raises ConfigError."""
    wanted = os.environ.get(variable) or None
    reasons: list[str] = []
    for choice in choices:
        if wanted not in (None, choice.name):
            continue
        if (reason := choice.needs()) is None:
            return choice
        reasons.append(f"{choice.name}: {reason}")
    if not reasons:
        allowed = ", ".join(choice.name for choice in choices)
        raise ConfigError(f"{variable}={wanted!r} is unknown; allowed: {allowed}")
    raise ConfigError(f"{variable}: {'; '.join(reasons)}")


def gpu_name() -> str | None:
    """The GPU that device "auto" takes; None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def describe() -> dict[str, object]:
    """What `tandem doctor` prints of the GPU path; only where torch sees a GPU."""
    from kernels.attentions import describe_attentions

    name = gpu_name()
    if name is None:
        return {}
    operations = choose("TANDEM_GPU_KERNELS", OPERATIONS).name
    return {"gpu": name, "gpu_operations": operations, **describe_attentions()}
