"""`kernels.backends.Operations` and `Attention` by torch alone, on any device and in any dtype: what other backends are
held against, and what is left where nothing else can be had. Slow: attention goes sequence by sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kernels.activation import silu_mul_reference
from kernels.attention import paged_attention_reference
from kernels.backends import AttentionMeta, AttentionShape, DrawResults, HostStep
from kernels.blocks import copy_blocks_reference
from kernels.kv_codes import FixedScales
from kernels.norm import rms_norm_reference
from kernels.rope import rope_and_store_reference
from kernels.sampling import Draw, draw_tokens
from tandem.errors import InternalError


class TorchOperations:
    """See `kernels.backends.Operations`. Computes in float32 and rounds results to the dtype of the input."""

    name = "torch"
    capturable = False

    @property
    def numerics(self) -> str:
        """torch's version."""
        return f"torch-{torch.__version__}"

    def embedding(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of the table."""
        return table[ids]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        """As `kernels.norm.rms_norm`; the sum is rounded before it is normed."""
        total = x if residual is None else residual.add_(x)
        return rms_norm_reference(total.float(), weight.float(), eps).to(x.dtype)

    def rms_norm_heads(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        """As `kernels.norm.rms_norm_heads`."""
        return out.copy_(rms_norm_reference(x.float(), weight.float(), eps))

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
        """As `kernels.rope.rope_and_store`."""
        step = (qkv.float(), positions, slots, cos, sin, kv_layer)
        return rope_and_store_reference(*step, num_heads, interleaved, kv_scales, fixed_scales).to(qkv.dtype)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """As `kernels.activation.silu_mul`."""
        return silu_mul_reference(gate_up.float()).to(gate_up.dtype)

    def copy_blocks(self, cache: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """As `kernels.blocks.copy_blocks`."""
        copy_blocks_reference(cache, pairs)

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> DrawResults:
        """By the CPU's sampler, one draw after the other: it is waited for."""
        return draw_on_cpu(logits, draws)

    def sample(self, logits: Tensor, settings: Mapping[str, Tensor]) -> Tensor:
        """Raises InternalError: nothing here can be captured."""
        raise InternalError("torch's operations can't be captured")


def draw_on_cpu(logits: Tensor, draws: Sequence[Draw]) -> DrawResults:
    """`kernels.sampling.draw_tokens` with results as a device's sampler gives them."""
    drawn = draw_tokens(logits.float().cpu().contiguous(), draws)
    most = max((len(one.top_token_ids) for one in drawn), default=0)
    values = torch.zeros((3, len(drawn)), dtype=torch.int32)
    top_ids, top_logprobs = torch.zeros((len(drawn), most), dtype=torch.int32), torch.zeros((len(drawn), most))
    logprobs = torch.zeros(len(drawn))
    for i, one in enumerate(drawn):
        values[0, i], logprobs[i] = one.token_id, one.logprob or 0.0
        count = len(one.top_token_ids)
        top_ids[i, :count] = torch.tensor(one.top_token_ids, dtype=torch.int32)
        top_logprobs[i, :count] = torch.tensor(one.top_logprobs)
    values[1] = logprobs.view(torch.int32)
    return DrawResults(*(result.to(logits.device) for result in (values, top_ids, top_logprobs)))


class TorchAttention:
    """Gathers each sequence's keys and values."""

    name = numerics = "torch"
    capturable = False

    def __init__(self, shape: AttentionShape, device: torch.device) -> None:
        """Any shape on any device."""
        self._soft_cap = shape.soft_cap

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
        """In float32."""
        step = (meta.block_tables, meta.query_starts, meta.context_lens)
        cap = self._soft_cap
        return paged_attention_reference(q.float(), kv_layer, *step, scale, window, kv_scales, cap).to(q.dtype)
