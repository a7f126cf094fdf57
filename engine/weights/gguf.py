"""GGUF files: memory-mapped, dequantised one tensor at a time by the `gguf` package.

Life cycle: as `engine.weights.checkpoint.Checkpoint` says. Tensors of a quantised type are new float32 tensors, and
their source pages are given back at once; F32 and BF16 tensors are views of the map until `release`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from engine.config import ModelConfig
from engine.models.registry import Architecture, gguf_architecture
from engine.weights.checkpoint import MAX_HEAD_DIM, StoredTensor, check_config
from engine.weights.fields import Fields
from engine.weights.gguf_codes import coded_weights, group_weights
from engine.weights.gguf_config import gguf_model_config
from engine.weights.gguf_header import Header, TensorEntry, read_header
from engine.weights.mapping import MappedFile
from kernels.coded import CodedWeights
from kernels.int8 import GroupWeights
from tandem.errors import ModelFormatError

_Q = GGMLQuantizationType
_PLAIN: Final = {_Q.F32: torch.float32, _Q.F16: torch.float16, _Q.BF16: torch.bfloat16}
_QUANTISED: Final = (_Q.Q4_0, _Q.Q4_1, _Q.Q5_0, _Q.Q5_1, _Q.Q8_0, _Q.Q4_K, _Q.Q5_K, _Q.Q6_K)
SUPPORTED_TYPES: Final = (*_PLAIN, *_QUANTISED)
_TOP_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_PATTERN: Final = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_ROPE_FACTORS: Final = "rope_freqs.weight"

CHUNK_ELEMENTS: Final = 1 << 18
"""Elements dequantised by one numpy call: intermediate arrays stay in the cache, and threads seldom trade the GIL."""


class GgufCheckpoint:
    """A GGUF file, see the module's text."""

    def __init__(self, path: Path) -> None:
        """Map the file and read its header. Raises ModelFormatError as `open_checkpoint`."""
        self._file = MappedFile(path)
        try:
            self._header = read_header(self._file)
            self._architecture = _architecture(self._header, path)
            self._entries = _by_canonical_name(self._header, path)
            _check_types(self._entries, path)
            config = gguf_model_config(self._header, self._architecture, path, self._rope_factors())
            self._config = check_config(config, path)
        except BaseException:
            self._file.close()
            raise

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self._config

    @property
    def files(self) -> Sequence[Path]:
        """The file."""
        return (self._file.path,)

    @property
    def coding(self) -> str:
        """Nothing: types say all."""
        return ""

    @property
    def kv_scales(self) -> str:
        """GGUF has none."""
        return ""

    def names(self) -> Sequence[str]:
        """All tensors' Hugging Face names, sorted."""
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, outermost first."""
        return self._entry(name).shape

    def tensor(self, name: str) -> Tensor:
        """The tensor as float32 (new memory), or bfloat16 or float32 as a view of the map."""
        entry = self._entry(name)
        if entry.type in _PLAIN:
            plain = self._file.tensor(entry.start, entry.shape, _PLAIN[entry.type])
            plain = self._unpermuted(name, plain)
            return plain.float() if entry.type is _Q.F16 else plain
        tensor = _dequantize(self._packed(name, entry), entry)
        self._file.drop(entry.start, entry.length)
        return tensor

    def coded(self, name: str) -> CodedWeights | None:
        """The matrix's codes, as new memory; None for types that `gguf_codes` doesn't know."""
        entry = self._entry(name)
        if entry.type in _PLAIN or len(entry.shape) != 2:
            return None
        weights = coded_weights(self._packed(name, entry), entry.type)
        if weights is not None:
            self._file.drop(entry.start, entry.length)
        return weights

    def codes(self, name: str) -> GroupWeights | None:
        """The matrix's codes, as new memory; None for types that `gguf_codes` doesn't know."""
        entry = self._entry(name)
        if entry.type in _PLAIN or len(entry.shape) != 2:
            return None
        weights = group_weights(self._packed(name, entry), entry.type)
        if weights is not None:
            self._file.drop(entry.start, entry.length)
        return weights

    def _packed(self, name: str, entry: TensorEntry) -> Tensor:
        """The stored blocks: uint8 [rows, row bytes]."""
        block, block_bytes = GGML_QUANT_SIZES[entry.type]
        row_bytes = entry.shape[-1] // block * block_bytes
        packed = self._file.tensor(entry.start, (math.prod(entry.shape[:-1]), row_bytes), torch.uint8)
        return self._unpermuted(name, packed)

    def release(self, name: str) -> None:
        """Give the tensor's source pages back."""
        entry = self._entry(name)
        self._file.drop(entry.start, entry.length)

    def stored(self) -> Iterator[StoredTensor]:
        """Every tensor as the file holds it, in order of name."""
        for name in self.names():
            entry = self._entries[name]
            yield StoredTensor(name, entry.type.name, entry.shape, self._file.view(entry.start, entry.length))

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise ModelFormatError(f"{self._file.path}: tensor {name} is missing") from None

    def _unpermuted(self, name: str, rows: Tensor) -> Tensor:
        """Undo the converter's reordering of q's and k's rows, as stored: [heads, D/2, 2] -> [heads, 2, D/2]."""
        parts = name.split(".")
        if not self._architecture.gguf_permuted or parts[-2] not in ("q_proj", "k_proj"):
            return rows
        heads = self._config.num_heads if parts[-2] == "q_proj" else self._config.num_kv_heads
        if rows.shape[0] % (2 * heads):
            raise ModelFormatError(f"{self._file.path}: tensor {name} has {rows.shape[0]} rows for {heads} heads")
        pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
        return pairs.transpose(1, 2).reshape(rows.shape)

    def _rope_factors(self) -> tuple[float, ...] | None:
        entry = self._header.tensors.get(_ROPE_FACTORS)
        if entry is None:
            return None
        if entry.type is not _Q.F32:
            raise ModelFormatError(f"{self._file.path}: {_ROPE_FACTORS} must be F32, not {entry.type.name}")
        if not 1 <= math.prod(entry.shape) <= MAX_HEAD_DIM:
            raise ModelFormatError(f"{self._file.path}: {_ROPE_FACTORS} has the impossible shape {entry.shape}")
        return tuple(self._file.tensor(entry.start, entry.shape, torch.float32).flatten().tolist())


def _architecture(header: Header, path: Path) -> Architecture:
    try:
        return gguf_architecture(Fields(str(path), header.fields).text("general.architecture"))
    except ModelFormatError as error:
        if error.reason != "UNKNOWN_ARCHITECTURE":
            raise
        raise ModelFormatError(f"{path}: {error.message}", reason=error.reason) from None


def _canonical(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown one keeps its name, and the loader says that it is unused."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER_PATTERN.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        return name
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _by_canonical_name(header: Header, path: Path) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for name, entry in header.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        canonical = _canonical(name)
        if canonical in entries:
            raise ModelFormatError(f"{path}: tensors {entries[canonical].name} and {name} are the same one")
        entries[canonical] = entry
    return entries


def _check_types(entries: dict[str, TensorEntry], path: Path) -> None:
    for entry in entries.values():
        if entry.type not in SUPPORTED_TYPES:
            known = ", ".join(t.name for t in SUPPORTED_TYPES)
            raise ModelFormatError(f"{path}: tensor {entry.name} has type {entry.type.name}; supported: {known}")


def _dequantize(packed: Tensor, entry: TensorEntry) -> Tensor:
    """float32 of `packed` uint8 [rows, row bytes], in cache-sized pieces."""
    block, block_bytes = GGML_QUANT_SIZES[entry.type]
    source = packed.contiguous().numpy().reshape(1, -1)
    result = torch.empty(entry.shape, dtype=torch.float32)
    target = result.numpy().reshape(-1)
    step = CHUNK_ELEMENTS // block
    with np.errstate(all="ignore"):
        for first in range(0, source.shape[1] // block_bytes, step):
            piece = source[:, first * block_bytes : (first + step) * block_bytes]
            target[first * block : (first + step) * block] = dequantize(piece, entry.type)[0]
    return result
