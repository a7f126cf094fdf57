"""`kernels.backends.Operations` and `Attention` of the CPU: the public operations of this room, which choose between
C++ and torch themselves (`kernels.dispatch`). Activations are float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kernels import dispatch
from kernels.activation import silu_mul
from kernels.attention import paged_attention
from kernels.backends import AttentionMeta, DrawResults, HostStep
from kernels.blocks import copy_blocks
from kernels.embedding import embedding
from kernels.kv_codes import FixedScales
from kernels.norm import rms_norm, rms_norm_heads
from kernels.rope import rope_and_store
from kernels.sampling import Draw
from kernels.torch_operations import draw_on_cpu
from tandem.errors import InternalError


class CpuOperations:
    """See `kernels.backends.Operations`; each method is documented at the function that it calls."""

    capturable = False

    @property
    def name(self) -> str:
        """cpp or torch."""
        return dispatch.select().name

    @property
    def numerics(self) -> str:
        """See `kernels.dispatch.Implementation`."""
        return dispatch.select().numerics

    def embedding(self, ids: Tensor, table: Tensor) -> Tensor:
        """See `kernels.embedding`."""
        return embedding(ids, table)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        """See `kernels.norm`."""
        return rms_norm(x, weight, eps, residual)

    def rms_norm_heads(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        """See `kernels.norm`."""
        return rms_norm_heads(x, weight, eps, out)

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
        """See `kernels.rope`."""
        step = (qkv, positions, slots, cos, sin, kv_layer)
        return rope_and_store(
            *step,
            num_heads,
            num_kv_heads,
            interleaved=interleaved,
            kv_scales=kv_scales,
            fixed_scales=fixed_scales,
        )

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `kernels.activation`."""
        return silu_mul(gate_up)

    def copy_blocks(self, cache: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """See `kernels.blocks`."""
        copy_blocks(cache, pairs)

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> DrawResults:
        """See `kernels.sampling.draw_tokens`."""
        return draw_on_cpu(logits, draws)

    def sample(self, logits: Tensor, settings: Mapping[str, Tensor]) -> Tensor:
        """Raises InternalError: nothing is captured on a CPU."""
        raise InternalError("a CPU's operations can't be captured")


class CpuAttention:
    """`kernels.attention`: nothing is planned."""

    capturable = False

    @property
    def name(self) -> str:
        """cpp or torch."""
        return dispatch.select().name

    def plan(self, step: HostStep) -> None:
        """Nothing to do."""

    def run(
        self,
        q: Tensor,
        kv_layer: Tensor,
        meta: AttentionMeta,
        scale: float,
        window: int | None,
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """See `kernels.attention.paged_attention`."""
        step = (q, kv_layer, meta.block_tables, meta.query_starts, meta.context_lens)
        return paged_attention(*step, scale, window, kv_scales=kv_scales)
