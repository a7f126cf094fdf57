"""From an open checkpoint to a `Model` in a GPU's memory: tensor by tensor, each rounded to the engine's dtype there.

The host holds one tensor at a time, the GPU the model and the parts of one fused weight. Quantised weights of
safetensors stay the file's codes where a product here takes such (`kernels.triton.products`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from kernels.int8 import GROUP
from tandem.errors import ConfigError

Shapes = Mapping[str, tuple[int, int]]
"""Tensor -> [N, K], of parts that are one behind the other along N."""


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
    *,
    codes: bool = True,
) -> Model:
    """Load all weights. The checkpoint may be closed afterwards. Without `codes` quantised ones are written out.

    Raises ModelFormatError as `load_model`, and ConfigError with the numbers when the GPU's memory can't hold them.
    """
    loader = _DeviceLoader(checkpoint, engine_config, backend, device, codes)
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
        self, checkpoint: Checkpoint, engine_config: EngineConfig, backend: Backend, device: torch.device, codes: bool
    ) -> None:
        self._keeps_codes = codes and bool(checkpoint.coding)
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
        shapes = {f"{at}.{part}.weight": (rows, inputs) for part, rows in outputs.items()}
        if (stored := self._stored(shapes, bias)) is not None:
            return stored
        if len(shapes) > 1 and (parts := self._side_by_side(shapes, bias)) is not None:
            return parts
        return quantized(self._fused(shapes), bias, self._engine.compute)

    def _side_by_side(self, shapes: Shapes, bias: Tensor | None) -> Product | None:
        """A product for each part, where some take the file's codes and no one product takes all; else None."""
        if not self._keeps_codes or self._engine.compute != "native":
            return None
        rows = [rows for rows, _ in shapes.values()]
        own: Sequence[Tensor | None] = [None] * len(rows) if bias is None else torch.split(bias, rows)
        each = [({name: shape}, part) for (name, shape), part in zip(shapes.items(), own, strict=True)]
        stored = [self._stored(shape, part) for shape, part in each]
        if all(product is None for product in stored):
            return None
        from kernels.triton.products import SideBySide

        pairs = zip(stored, each, strict=True)
        return SideBySide([product or DenseLinear(self._fused(shape), part) for product, (shape, part) in pairs])

    def _stored(self, shapes: Shapes, bias: Tensor | None) -> Product | None:
        """The file's own codes, where there is a product that takes those of all parts and `compute` wants such."""
        compute = self._engine.compute
        found: Product | None = None
        if self._keeps_codes and compute != "int4":
            found = self._scaled(shapes, bias)
        if found is None and (compute == "int4" or (self._keeps_codes and compute == "native")):
            found = self._grouped(shapes, bias)
        if found is not None:
            for name in shapes:
                self._source.release(name)
        return found

    def _scaled(self, shapes: Shapes, bias: Tensor | None) -> Product | None:
        """Codes of 8 bits, activations too."""
        coded = [self._source.coded(name, shape) for name, shape in shapes.items()]
        parts = [part for part in coded if part is not None]
        kinds = {"fp8" if part.fp8 else "int8" for part in parts}
        if len(parts) < len(coded) or (self._engine.compute != "native" and kinds != {self._engine.compute}):
            return None
        from kernels.triton.products import stored_product

        return stored_product(parts, self._device, bias)

    def _grouped(self, shapes: Shapes, bias: Tensor | None) -> Product | None:
        """Codes of weights alone, where all parts have such of one number of bits."""
        parts = [self._source.codes(name, shape) for name, shape in shapes.items()]
        codes = [part for part in parts if part is not None]
        if len(codes) < len(parts) or len({part.bits for part in codes}) > 1 or codes[0].codes.shape[1] % GROUP:
            return None
        from kernels.triton.products import coded_product

        return coded_product(codes, self._device, bias)

    def _fused(self, shapes: Shapes) -> Tensor:
        """All parts written out, one behind the other."""
        rows, inputs = sum(rows for rows, _ in shapes.values()), next(iter(shapes.values()))[1]
        weight = torch.empty((rows, inputs), dtype=self._dtype, device=self._device)
        first = 0
        for name, shape in shapes.items():
            weight[first : first + shape[0]].copy_(self._source.take(name, shape))
            self._source.release(name)
            first += shape[0]
        return weight

    def _weight(self, name: str, shape: tuple[int, int]) -> Tensor:
        weight = torch.empty(shape, dtype=self._dtype, device=self._device)
        weight.copy_(self._source.take(name, shape))
        self._source.release(name)
        return weight

    def _vector(self, name: str, length: int) -> Tensor:
        return self._source.vector(name, length).to(self._device)
