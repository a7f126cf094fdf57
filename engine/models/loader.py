"""From an open checkpoint to a `Model`: each tensor is read, packed and dropped before the next.

A few threads load a layer each, so the peak is the packed weights and the parts of one fused weight a thread. A tied LM
head is packed once and serves as the embedding table too. bfloat16 weights stay bfloat16 in the packed form even with
dtype float32: the kernels expand them exactly, so the result has the same bits at half the memory. Likewise quantised
weights stay their file's codes: those of safetensors whatever `compute` and dtype say, those of GGUF (Q4_0, Q4_1, Q8_0)
with float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.models.coded import CodedParts
from engine.models.embedding import CodedEmbedding, TableEmbedding, TiedEmbedding
from engine.models.rope import rope_tables
from engine.models.tensors import EMBEDDING, HEAD, TensorSource, load_side_by_side, most_bytes
from engine.models.transformer import Embedding, Layer, Linear, Model, Product, Progress
from engine.weights.checkpoint import Checkpoint
from kernels import dispatch
from kernels.coded import CodedLinear, pack_coded
from kernels.linear import PackedLinear, pack_linear, panel_bytes
from kernels.memory import Arena


def load_model(checkpoint: Checkpoint, engine_config: EngineConfig, progress: Progress | None = None) -> Model:
    """Load all weights. The checkpoint may be closed afterwards: nothing of the model lives in its map.

    Raises ModelFormatError: a tensor is missing, has a wrong shape or type, or is one the architecture does not use.
    """
    return _Loader(checkpoint, engine_config).load(progress)


class _Loader:
    """Life cycle: built, `load` once, thrown away."""

    def __init__(self, checkpoint: Checkpoint, engine_config: EngineConfig) -> None:
        self._source = TensorSource(checkpoint, engine_config.model)
        self._engine = engine_config
        self._config: ModelConfig = checkpoint.config
        self._arena = Arena(most_bytes(self._config, panel_bytes))

    def load(self, progress: Progress | None) -> Model:
        """The whole model."""
        config = self._config
        layers, (embedding, head) = load_side_by_side(
            self._layer, self._embedding_and_head, config.num_layers, progress
        )
        final_norm = self._source.vector("model.norm.weight", config.hidden_size)
        self._source.refuse_unused()
        cos, sin = rope_tables(config.rope, self._engine.context_limit(config))
        return Model(config, embedding, layers, final_norm, head, cos, sin)

    def _layer(self, index: int) -> Layer:
        config, at = self._config, f"model.layers.{index}"
        width, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        query, key = config.num_heads * dim, config.num_kv_heads * dim
        attention, bias = f"{at}.self_attn", config.attention_bias
        return Layer(
            input_norm=self._source.vector(f"{at}.input_layernorm.weight", width),
            qkv=self._linear(attention, {"q_proj": query, "k_proj": key, "v_proj": key}, width, bias),
            query_norm=self._source.vector(f"{attention}.q_norm.weight", dim) if config.qk_norm else None,
            key_norm=self._source.vector(f"{attention}.k_norm.weight", dim) if config.qk_norm else None,
            output=self._linear(attention, {"o_proj": width}, query, config.attention_output_bias),
            post_norm=self._source.vector(f"{at}.post_attention_layernorm.weight", width),
            gate_up=self._linear(f"{at}.mlp", {"gate_proj": inner, "up_proj": inner}, width, config.mlp_bias),
            down=self._linear(f"{at}.mlp", {"down_proj": width}, inner, config.mlp_bias),
            window=config.layer_window(index),
            kv_scales=self._source.kv_scales(attention, self._engine.kv_dtype),
        )

    def _embedding_and_head(self) -> tuple[Embedding, Product]:
        shape = (self._config.vocab_size, self._config.hidden_size)
        tied = self._config.tie_embeddings
        table = self._coded(EMBEDDING, shape)
        if not tied:
            return self._table(table, shape), self._product([HEAD], [shape], None)
        self._source.use(HEAD)
        if table is not None:
            return CodedEmbedding(table, shared=True), CodedParts([table])
        head = Linear(self._pack([EMBEDDING], [shape]))
        return TiedEmbedding(head.packed), head

    def _table(self, coded: CodedLinear | None, shape: tuple[int, int]) -> Embedding:
        """An embedding table of its own."""
        if coded is not None:
            return CodedEmbedding(coded, shared=False)
        table = self._cast(self._source.take(EMBEDDING, shape)).clone()
        self._source.release(EMBEDDING)
        return TableEmbedding(table)

    def _linear(self, at: str, outputs: dict[str, int], inputs: int, with_bias: bool) -> Product:
        """The product of all `outputs` (part -> rows) fused, with their biases fused likewise."""
        vector, bias = self._source.vector, None
        if with_bias:
            bias = torch.cat([vector(f"{at}.{part}.bias", n) for part, n in outputs.items()])
        return self._product([f"{at}.{part}.weight" for part in outputs], [(n, inputs) for n in outputs.values()], bias)

    def _product(self, names: Sequence[str], shapes: Sequence[tuple[int, int]], bias: Tensor | None) -> Product:
        """One weight where all parts are plain numbers, else a part each."""
        parts = [self._coded(name, shape) for name, shape in zip(names, shapes, strict=True)]
        if all(part is None for part in parts):
            return Linear(self._pack(names, shapes), bias)
        each = zip(parts, names, shapes, strict=True)
        return CodedParts([self._pack([name], [shape]) if part is None else part for part, name, shape in each], bias)

    def _coded(self, name: str, shape: tuple[int, int]) -> CodedLinear | None:
        """The weight's own codes, packed.

        GGUF's are expanded with bfloat16, to be rounded to it, and without C++, whose lack shall not be slower still.
        """
        expand = self._engine.dtype == "bfloat16" or dispatch.select().name != "cpp"
        if expand and not self._source.coding:
            return None
        weights = self._source.coded(name, shape)
        if weights is None:
            return None
        packed = pack_coded(weights)
        self._source.release(name)
        return packed

    def _pack(self, names: Sequence[str], shapes: Sequence[tuple[int, int]]) -> PackedLinear:
        parts = [self._cast(self._source.take(name, shape)) for name, shape in zip(names, shapes, strict=True)]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.float() for part in parts]
        packed = pack_linear(parts, self._engine.compute, self._arena)
        for name in names:
            self._source.release(name)
        return packed

    def _cast(self, tensor: Tensor) -> Tensor:
        """float32 is the wish to keep what the file holds; bfloat16 rounds."""
        return tensor.to(torch.bfloat16) if self._engine.dtype == "bfloat16" else tensor
