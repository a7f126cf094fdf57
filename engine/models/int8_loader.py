"""From an open checkpoint to a `FusedModel`: codes are taken as the file holds them, all else is quantised to 8 bits.

Which products take 15 bits of their input: down in the first three layers and the last. Massive activations (Sun et
al., "Massive Activations in Large Language Models", 2024) are made and taken back there, and cost int8 most of what it
loses: see docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.models.fused import FusedModel, step_shape
from engine.models.panels import Panels
from engine.models.rope import rope_tables
from engine.models.tensors import EMBEDDING, HEAD, TensorSource, load_side_by_side
from engine.models.transformer import Progress
from engine.weights.checkpoint import Checkpoint
from engine.weights.int8_codes import rounded, rounded_again
from kernels.int8 import GroupWeights, Int8Linear, quantize_weight
from kernels.step import Step, StepLayer, StepLinear, gate_up_order

FINE_FIRST: Final = 3
FINE_LAST: Final = 1


def load_int8_model(
    checkpoint: Checkpoint,
    engine_config: EngineConfig,
    progress: Progress | None = None,
    identity: str | None = None,
) -> FusedModel:
    """Load all weights. The checkpoint may be closed afterwards: nothing of the model lives in its map.

    `identity`, the checkpoint's, lets processes that load the same share memory (see `engine.weights.sharing`).

    Raises ModelFormatError: a tensor is missing, has a wrong shape or type, or is one the architecture does not use.
    """
    panels = Panels(checkpoint.config, identity)
    try:
        model = _Int8Loader(checkpoint, engine_config, panels).load(progress)
    except BaseException:
        panels.abandon()
        raise
    panels.finish()
    return model


def has_fine_down(index: int, num_layers: int) -> bool:
    """True for the layers whose down product takes 15 bits of its input."""
    return index < FINE_FIRST or index >= num_layers - FINE_LAST


class _Int8Loader:
    """Life cycle: built, `load` once, thrown away."""

    def __init__(self, checkpoint: Checkpoint, engine_config: EngineConfig, panels: Panels) -> None:
        self._source = TensorSource(checkpoint, engine_config.model)
        self._engine = engine_config
        self._config: ModelConfig = checkpoint.config
        self._panels = panels

    def load(self, progress: Progress | None) -> FusedModel:
        """The whole model."""
        config = self._config
        layers, (head, table) = load_side_by_side(self._layer, self._head_and_table, config.num_layers, progress)
        final_norm = self._source.vector("model.norm.weight", config.hidden_size)
        self._source.refuse_unused()
        cos, sin = rope_tables(config.rope, self._engine.context_limit(config))
        step_nbytes = head.nbytes + final_norm.nbytes + sum(_layer_bytes(layer) for layer in layers)
        nbytes = step_nbytes + sum(t.nbytes for t in (table, cos, sin) if t is not None)
        kernel = Step(step_shape(config), layers, final_norm, head, table, cos, sin)
        return FusedModel(config, kernel, nbytes, step_nbytes)

    def _layer(self, index: int) -> StepLayer:
        config, at = self._config, f"model.layers.{index}"
        width, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        query, key = config.num_heads * dim, config.num_kv_heads * dim
        attention, bias, vector = f"{at}.self_attn", config.attention_bias, self._source.vector
        gates = {"gate_proj": inner, "up_proj": inner}
        return StepLayer(
            input_norm=vector(f"{at}.input_layernorm.weight", width),
            qkv=self._linear(f"{index}.qkv", attention, {"q_proj": query, "k_proj": key, "v_proj": key}, width, bias),
            query_norm=vector(f"{attention}.q_norm.weight", dim) if config.qk_norm else None,
            key_norm=vector(f"{attention}.k_norm.weight", dim) if config.qk_norm else None,
            output=self._linear(f"{index}.output", attention, {"o_proj": width}, query, config.attention_output_bias),
            post_norm=vector(f"{at}.post_attention_layernorm.weight", width),
            gate_up=self._linear(f"{index}.gate_up", f"{at}.mlp", gates, width, config.mlp_bias, gate_up_order(inner)),
            down=self._linear(f"{index}.down", f"{at}.mlp", {"down_proj": width}, inner, config.mlp_bias),
            window=config.layer_window(index),
            kv_scales=self._source.kv_scales(attention, self._engine.kv_dtype),
            fine_down=has_fine_down(index, config.num_layers),
        )

    def _head_and_table(self) -> tuple[StepLinear, Tensor | None]:
        shape = (self._config.vocab_size, self._config.hidden_size)
        tied = self._config.tie_embeddings
        head = StepLinear(self._packed("head", {EMBEDDING if tied else HEAD: shape[0]}, shape[1]))
        if tied:
            self._source.use(HEAD)
            return head, None
        table = self._source.take(EMBEDDING, shape).clone()
        self._source.release(EMBEDDING)
        return head, table

    def _linear(
        self,
        name: str,
        at: str,
        outputs: Mapping[str, int],
        inputs: int,
        with_bias: bool,
        order: Tensor | None = None,
    ) -> StepLinear:
        """The product of all `outputs` (part -> rows) fused, with their biases fused likewise, columns in `order`."""
        packed = self._packed(name, {f"{at}.{part}.weight": n for part, n in outputs.items()}, inputs, order)
        if not with_bias:
            return StepLinear(packed)
        bias = torch.cat([self._source.vector(f"{at}.{part}.bias", n) for part, n in outputs.items()])
        if order is not None:
            bias = torch.empty_like(bias).index_copy_(0, order, bias)
        return StepLinear(packed, bias)

    def _packed(self, name: str, tensors: Mapping[str, int], inputs: int, order: Tensor | None = None) -> Int8Linear:
        """`tensors` (name -> rows) fused; nothing of them is read where another process has packed them."""
        received = self._panels.received(name)
        if received is not None:
            for tensor, n in tensors.items():
                self._source.expect(tensor, (n, inputs))
            return received
        parts = [self._codes(tensor, (n, inputs)) for tensor, n in tensors.items()]
        if len({part.bits for part in parts}) > 1:
            parts = [part if part.bits == 8 else quantize_weight(part.dequantized()) for part in parts]
        return self._panels.pack(name, parts, order)

    def _codes(self, name: str, shape: tuple[int, int]) -> GroupWeights:
        codes = self._source.codes(name, shape)
        if codes is None:
            coded = self._source.coded(name, shape)
            codes = rounded(self._source.take(name, shape)) if coded is None else rounded_again(coded)
        self._source.release(name)
        return codes


def _layer_bytes(layer: StepLayer) -> int:
    norms = (layer.input_norm, layer.post_norm, layer.query_norm, layer.key_norm)
    linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
    return sum(n.nbytes for n in norms if n is not None) + sum(w.nbytes for w in linears)
