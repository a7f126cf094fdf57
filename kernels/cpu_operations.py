"""`kernels.backends.Operations` and `Attention` of the CPU: the public operations of this room, which choose between
C++ and torch themselves (`kernels.dispatch`). Activations are float32."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kernels import dispatch
from kernels.activation import silu_mul
from kernels.attention import paged_attention
from kernels.backends import AttentionMeta, HostStep
from kernels.blocks import copy_blocks
from kernels.embedding import embedding
from kernels.norm import rms_norm, rms_norm_heads
from kernels.rope import rope_and_store
from kernels.torch_operations import draw_on_cpu
from tandem.errors import InternalError


class CpuOperations:
    """See `kernels.backends.Operations`: the functions themselves."""

    capturable = False

    @property
    def name(self) -> str:
        """cpp or torch."""
        return dispatch.select().name

    @property
    def numerics(self) -> str:
        """See `kernels.dispatch.Implementation`."""
        return dispatch.select().numerics

    embedding = staticmethod(embedding)
    rms_norm = staticmethod(rms_norm)
    rms_norm_heads = staticmethod(rms_norm_heads)
    rope_and_store = staticmethod(rope_and_store)
    silu_mul = staticmethod(silu_mul)
    copy_blocks = staticmethod(copy_blocks)
    draw = staticmethod(draw_on_cpu)

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

    @property
    def numerics(self) -> str:
        """See `kernels.dispatch.Implementation`."""
        return dispatch.select().numerics

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
