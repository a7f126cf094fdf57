"""EAGLE heads: one transformer layer that drafts from what the target has computed of its own tokens.

Row p takes the token at position p + 1 and the target's features at p, and says what comes at p + 2. Behind the last
known token the head's own result takes the place of the features. EAGLE-1 (Li et al., arXiv:2401.15077): features are
the target's last hidden states, and so is what the head predicts; the target's LM head turns them into tokens. EAGLE-3
(arXiv:2503.01840): features are the hidden states before three of the target's layers, and the head has an LM head of
its own, over a vocabulary of the commonest tokens. Immutable once loaded (`engine.models.eagle_loader`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.models.meta import ForwardMeta
from engine.models.transformer import Embedding, Linear, Product
from kernels.activation import silu_mul
from kernels.attention import paged_attention
from kernels.norm import rms_norm
from kernels.rope import rope_and_store


@dataclass(frozen=True, slots=True, eq=False)
class EagleLayer:
    """The weights of the one layer; W is the head's width. Norms are float32 [W]."""

    input_norm: Tensor | None
    """Of embeddings; EAGLE-1 has none."""
    hidden_norm: Tensor | None
    """Of features; EAGLE-1 has none."""
    qkv: Linear
    """From W inputs (EAGLE-1) or 2 W (EAGLE-3)."""
    output: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, eq=False)
class EagleHead:
    """A loaded head, see the module's text."""

    config: ModelConfig
    """The layer's shape; `vocab_size` is the target's."""
    taps: tuple[int, ...]
    """Layers of the target before which features are taken; none: the last hidden states (EAGLE-1)."""
    embedding: Embedding
    fuse: Linear
    """EAGLE-1: embedding and features, 2 W, to W. EAGLE-3: features of all taps to W."""
    layer: EagleLayer
    norm: Tensor | None
    """float32 [W], before the LM head; EAGLE-1 has none."""
    lm_head: Product
    token_ids: Tensor | None
    """int64 [rows of lm_head]: which token each is; None: all of them, in order."""
    normed_residual: bool
    """EAGLE-3 only: features are added to after their norm, not before it."""
    cos: Tensor
    sin: Tensor
    """float32 [positions, rotary_dim / 2]."""

    def fused(self, features: Tensor) -> Tensor:
        """The target's features [T, F] as the layer takes them: float32 [T, W]."""
        return self.fuse(features) if self.taps else features

    def forward(self, token_ids: Tensor, hidden: Tensor, meta: ForwardMeta, kv_layer: Tensor) -> Tensor:
        """One step over T rows: token ids int64 [T], `hidden` float32 [T, W] from `fused` or from an earlier call.

        Writes the rows' K and V to `kv_layer` [blocks, 2, Hkv, block_size, D]; returns float32 [T, W].
        """
        layer, eps = self.layer, self.config.rms_eps
        embedded = self.embedding(token_ids)
        if layer.input_norm is not None and layer.hidden_norm is not None:
            normed = rms_norm(hidden, layer.hidden_norm, eps)
            residual = (normed if self.normed_residual else hidden).clone()
            x = torch.cat([rms_norm(embedded, layer.input_norm, eps), normed], dim=1)
        else:
            x = self.fuse(torch.cat([embedded, hidden], dim=1))
            residual = x.clone()
        x = rms_norm(self._attention(x, meta, kv_layer), layer.post_norm, eps, residual=residual)
        return residual + layer.down(silu_mul(layer.gate_up(x)))

    def logits(self, hidden: Tensor) -> Tensor:
        """What rows [R, W] of `forward`'s result say: float32 [R, V]; -inf for tokens that the head doesn't know."""
        if self.norm is not None:
            hidden = rms_norm(hidden, self.norm, self.config.rms_eps)
        known = self.lm_head(hidden)
        if self.token_ids is None:
            return known
        return torch.full((len(known), self.config.vocab_size), -torch.inf).index_copy_(1, self.token_ids, known)

    def _attention(self, x: Tensor, meta: ForwardMeta, kv_layer: Tensor) -> Tensor:
        config, layer = self.config, self.layer
        heads, interleaved = (config.num_heads, config.num_kv_heads), config.rope.interleaved
        places = (meta.positions, meta.slots, self.cos, self.sin, kv_layer)
        q = rope_and_store(layer.qkv(x), *places, *heads, interleaved=interleaved)
        tables, starts, lengths = meta.block_tables, meta.query_starts, meta.context_lens
        mixed = paged_attention(q, kv_layer, tables, starts, lengths, config.head_dim**-0.5)
        return layer.output(mixed.view(x.shape[0], config.num_heads * config.head_dim))
