"""The one transformer: Llama, Mistral, Qwen2 and Qwen3 by configuration.

A `Model` is immutable once loaded and holds no state of any sequence: what a step needs comes as `ForwardMeta`, what it
leaves goes to the KV cache. All arithmetic is in `kernels`: the products are the weights' own, everything else is the
`Backend`'s. On a CPU one row's bits never depend on another row (with compute "exact") and activations are float32
[rows, width]; on a GPU they have the engine's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from engine.config import ModelConfig
from engine.models.meta import ForwardMeta, Predictions, Taps
from kernels.backends import Backend, for_cpu
from kernels.kv_codes import FixedScales
from kernels.linear import PackedLinear, linear


class KvLayers(Protocol):
    """The paged cache, as far as a model reads it."""

    def layer(self, index: int) -> Tensor:
        """K and V of one layer: [num_blocks, 2, Hkv, block_size, D], a view of the whole cache."""

    def layer_scales(self, index: int) -> Tensor | None:
        """Scales of one layer's codes: [num_blocks, 2, Hkv, block_size]; None where the cache has none."""


class Embedding(Protocol):
    """Token ids to rows."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def __call__(self, ids: Tensor) -> Tensor:
        """int64 [T] -> activations [T, W]."""


class Product(Protocol):
    """A weight [N, K] with its bias, however it is held."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def __call__(self, x: Tensor) -> Tensor:
        """Activations [T, K] -> [T, N]; float32 on a CPU."""


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A `Product` of the CPU: a packed weight [N, K] with its bias float32 [N] or None."""

    packed: PackedLinear
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [T, K] -> float32 [T, N]."""
        return linear(x, self.packed, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """The weights of one layer; norms are float32 [W], head norms float32 [D] or None."""

    input_norm: Tensor
    qkv: Product
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Product
    post_norm: Tensor
    gate_up: Product
    down: Product
    window: int | None
    """Sliding window in tokens; None: the layer sees everything."""
    kv_scales: FixedScales | None = None
    """What 8-bit keys and values are divided by; None: each row's own."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        norms = (self.input_norm, self.query_norm, self.key_norm, self.post_norm)
        linears = (self.qkv, self.output, self.gate_up, self.down)
        return sum(n.nbytes for n in norms if n is not None) + sum(w.nbytes for w in linears)


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A loaded model, see the module's text. Built by `engine.models.loader.load_model`."""

    config: ModelConfig
    embedding: Embedding
    layers: Sequence[Layer]
    final_norm: Tensor
    head: Product
    cos: Tensor
    """float32 [max positions, rotary_dim / 2], beside `sin`."""
    sin: Tensor
    backend: Backend = field(default_factory=for_cpu)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights; tied ones count once."""
        tables = self.cos.nbytes + self.sin.nbytes + self.final_norm.nbytes
        return self.embedding.nbytes + self.head.nbytes + tables + sum(layer.nbytes for layer in self.layers)

    def step(
        self,
        token_ids: Tensor,
        meta: ForwardMeta,
        kv_cache: KvLayers,
        rows: Tensor | None,
        greedy: Tensor | None = None,
        taps: Taps | None = None,
    ) -> Predictions:
        """`forward`, then what it says of `rows` int64 [R] (None: of every row).

        `greedy` uint8 [R] marks rows of which only the largest logit is wanted; a model may then leave out the others.
        """
        hidden = self.forward(token_ids, meta, kv_cache, taps)
        return Predictions(self.logits(hidden if rows is None else hidden[rows]))

    def forward(self, token_ids: Tensor, meta: ForwardMeta, kv_cache: KvLayers, taps: Taps | None = None) -> Tensor:
        """One step over T rows: writes their K and V to the cache and returns hidden states [T, W].

        `token_ids` is int64 [T]; `meta` places the rows. `taps` are filled. The result is normed, ready for `logits`.
        Raises InternalError when ids, positions, slots or blocks are out of range (on a CPU; on a GPU whoever builds
        the step vouches for them).
        """
        norm, eps = self.backend.operations.rms_norm, self.config.rms_eps
        residual = self.embedding(token_ids)
        x = norm(residual, self.layers[0].input_norm, eps)
        streams: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            if taps is not None and index in taps.layers:
                streams[index] = residual.clone()
            update = self._attention(layer, x, meta, kv_cache.layer(index), kv_cache.layer_scales(index))
            x = norm(update, layer.post_norm, eps, residual)
            update = layer.down(self.backend.operations.silu_mul(layer.gate_up(x)))
            x = norm(update, self._norm_after(index), eps, residual)
        if taps is not None:
            taps.kept = [streams[index] for index in taps.layers] or [x]
        return x

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Logits of rows of `forward`'s result: [R, W] -> [R, V]."""
        return self.head(hidden_rows)

    def _attention(
        self, layer: Layer, x: Tensor, meta: ForwardMeta, kv_layer: Tensor, kv_scales: Tensor | None
    ) -> Tensor:
        """Attention of `layer` with its output product: [T, W] -> [T, W]."""
        config = self.config
        qkv = layer.qkv(x)
        if layer.query_norm is not None and layer.key_norm is not None:
            qkv = self._norm_heads(qkv, layer.query_norm, layer.key_norm)
        q = self.backend.operations.rope_and_store(
            qkv,
            meta.positions,
            meta.slots,
            self.cos,
            self.sin,
            kv_layer,
            config.num_heads,
            config.num_kv_heads,
            interleaved=config.rope.interleaved,
            kv_scales=kv_scales,
            fixed_scales=layer.kv_scales,
        )
        scale, attention = config.head_dim**-0.5, self.backend.attention
        mixed = attention.run(q, kv_layer, meta, scale, layer.window, kv_scales)
        return layer.output(mixed.view(x.shape[0], config.num_heads * config.head_dim))

    def _norm_heads(self, qkv: Tensor, query_norm: Tensor, key_norm: Tensor) -> Tensor:
        """Norm every head of q and of k within qkv [T, (Hq + 2 Hkv) D], in place."""
        config = self.config
        heads = qkv.view(qkv.shape[0], -1, config.head_dim)
        query = heads[:, : config.num_heads]
        key = heads[:, config.num_heads : config.num_heads + config.num_kv_heads]
        norm = self.backend.operations.rms_norm_heads
        norm(query, query_norm, config.rms_eps, query)
        norm(key, key_norm, config.rms_eps, key)
        return qkv

    def _norm_after(self, index: int) -> Tensor:
        """The norm that follows layer `index`: the next layer's, or the last one."""
        return self.layers[index + 1].input_norm if index + 1 < len(self.layers) else self.final_norm


Progress = Callable[[int, int], None]
"""Called with (layers loaded, layers in all)."""
