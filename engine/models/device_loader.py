"""From an open checkpoint to a `Model` in a GPU's memory: tensor by tensor, each rounded to the engine's dtype there.

The host holds one tensor at a time, the GPU the model and the parts of one fused weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import Compute, EngineConfig, ModelConfig
from engine.kv_cache import TORCH_DTYPES
from engine.models.rope import rope_tables
from engine.models.tensors import EMBEDDING, HEAD, TensorSource
from engine.models.transformer import Layer, Model, Product, Progress
from engine.weights.checkpoint import Checkpoint
from kernels.backends import Backend, Operations
from kernels.dense import DenseLinear
from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DeviceEmbedding:
    """A table [V, W] on the device; with tied weights the head's own."""

    table: Tensor
    operations: Operations
    tied: bool

    @property
    def nbytes(self) -> int:
        """Bytes held beside the LM head."""
        return 0 if self.tied else self.table.nbytes

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows of the table: int64 [T] -> [T, W]."""
        return self.operations.embedding(ids, self.table)


def load_device_model(
    checkpoint: Checkpoint,
    engine_config: EngineConfig,
    backend: Backend,
    device: torch.device,
    progress: Progress | None = None,
) -> Model:
    """Load all weights. The checkpoint may be closed afterwards.

    Raises ModelFormatError as `load_model`, and ConfigError with the numbers when the GPU's memory can't hold them.
    """
    loader = _DeviceLoader(checkpoint, engine_config, backend, device)
    try:
        return loader.load(progress)
    except torch.OutOfMemoryError as error:
        needed = weight_bytes(checkpoint.config, engine_config)
        raise ConfigError(
            f"{engine_config.model} takes {needed / 1e9:.1f} GB in {engine_config.dtype}, which don't fit the GPU's "
            f"free memory: {error}"
        ) from error


def weight_bytes(config: ModelConfig, engine_config: EngineConfig) -> int:
    """Bytes of the big weights in the engine's dtype."""
    width, inner = config.hidden_size, config.intermediate_size
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim * width
    tables = config.vocab_size * width * (1 if config.tie_embeddings else 2)
    elements = config.num_layers * (attention + 3 * inner * width) + tables
    return elements * TORCH_DTYPES[engine_config.dtype].itemsize


def quantized(weight: Tensor, bias: Tensor | None, compute: Compute) -> Product:
    """A weight [N, K] on the device as `compute` wants it."""
    if compute == "native":
        return DenseLinear(weight, bias)
    from kernels.triton.products import group_product, scaled_product

    if compute == "int4":
        return group_product(weight, bias)
    return scaled_product(weight, torch.float8_e4m3fn if compute == "fp8" else torch.int8, bias)


class _DeviceLoader:
    """Life cycle: built, `load` once, thrown away."""

    def __init__(
        self, checkpoint: Checkpoint, engine_config: EngineConfig, backend: Backend, device: torch.device
    ) -> None:
        self._source = TensorSource(checkpoint, engine_config.model)
        self._engine, self._config = engine_config, checkpoint.config
        self._backend, self._device = backend, device
        self._dtype = TORCH_DTYPES[engine_config.dtype]

    def load(self, progress: Progress | None) -> Model:
        """The whole model."""
        config = self._config
        layers: list[Layer] = []
        for index in range(config.num_layers):
            layers.append(self._layer(index))
            if progress is not None:
                progress(len(layers), config.num_layers)
        head, embedding = self._head_and_embedding()
        final_norm = self._vector("model.norm.weight", config.hidden_size)
        self._source.refuse_unused()
        tables = rope_tables(config.rope, self._engine.context_limit(config))
        cos, sin = (table.to(self._device) for table in tables)
        return Model(config, embedding, tuple(layers), final_norm, head, cos, sin, self._backend)

    def _layer(self, index: int) -> Layer:
        config, at = self._config, f"model.layers.{index}"
        width, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        query, key = config.num_heads * dim, config.num_kv_heads * dim
        attention, bias = f"{at}.self_attn", config.attention_bias
        return Layer(
            input_norm=self._vector(f"{at}.input_layernorm.weight", width),
            qkv=self._product(attention, {"q_proj": query, "k_proj": key, "v_proj": key}, width, bias),
            query_norm=self._vector(f"{attention}.q_norm.weight", dim) if config.qk_norm else None,
            key_norm=self._vector(f"{attention}.k_norm.weight", dim) if config.qk_norm else None,
            output=self._product(attention, {"o_proj": width}, query, config.attention_output_bias),
            post_norm=self._vector(f"{at}.post_attention_layernorm.weight", width),
            gate_up=self._product(f"{at}.mlp", {"gate_proj": inner, "up_proj": inner}, width, config.mlp_bias),
            down=self._product(f"{at}.mlp", {"down_proj": width}, inner, config.mlp_bias),
            window=config.layer_window(index),
            kv_scales=self._source.kv_scales(attention, self._engine.kv_dtype),
        )

    def _head_and_embedding(self) -> tuple[Product, DeviceEmbedding]:
        shape = (self._config.vocab_size, self._config.hidden_size)
        tied = self._config.tie_embeddings
        table = self._weight(EMBEDDING, shape)
        if tied:
            self._source.use(HEAD)
        head = table if tied else self._weight(HEAD, shape)
        return DenseLinear(head, wide=True), DeviceEmbedding(table, self._backend.operations, tied)

    def _product(self, at: str, outputs: Mapping[str, int], inputs: int, with_bias: bool) -> Product:
        """The product of all `outputs` (part -> rows) fused, with their biases fused likewise."""
        bias = None
        if with_bias:
            biases = [self._source.vector(f"{at}.{part}.bias", rows) for part, rows in outputs.items()]
            bias = torch.cat(biases).to(self._device, self._dtype)
        if self._engine.compute == "int4" and (coded := self._coded(at, outputs, inputs, bias)) is not None:
            return coded
        return quantized(self._fused(at, outputs, inputs), bias, self._engine.compute)

    def _coded(self, at: str, outputs: Mapping[str, int], inputs: int, bias: Tensor | None) -> Product | None:
        """The file's own codes, where all parts have such of one number of bits."""
        names = {f"{at}.{part}.weight": rows for part, rows in outputs.items()}
        parts = [self._source.codes(name, (rows, inputs)) for name, rows in names.items()]
        codes = [part for part in parts if part is not None]
        if len(codes) < len(parts) or len({part.bits for part in codes}) > 1:
            return None
        from kernels.triton.products import coded_product

        product = coded_product(codes, self._device, bias)
        for name in names:
            self._source.release(name)
        return product

    def _fused(self, at: str, outputs: Mapping[str, int], inputs: int) -> Tensor:
        weight = torch.empty((sum(outputs.values()), inputs), dtype=self._dtype, device=self._device)
        first = 0
        for part, rows in outputs.items():
            name = f"{at}.{part}.weight"
            weight[first : first + rows].copy_(self._source.take(name, (rows, inputs)))
            self._source.release(name)
            first += rows
        return weight

    def _weight(self, name: str, shape: tuple[int, int]) -> Tensor:
        weight = torch.empty(shape, dtype=self._dtype, device=self._device)
        weight.copy_(self._source.take(name, shape))
        self._source.release(name)
        return weight

    def _vector(self, name: str, length: int) -> Tensor:
        return self._source.vector(name, length).to(self._device)
