"""Writers of tiny model files: GGUF through the gguf package, safetensors through theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 2, 256, 512, 8, 4, 64


def _tensors(tied: bool) -> dict[str, np.ndarray]:
    """A Llama's tensors under their GGUF names, rows of multiples of 256 so that K-quants fit."""
    random = np.random.default_rng(5)
    kv = HIDDEN // HEADS * KV_HEADS

    def normal(*shape: int) -> np.ndarray:
        return random.normal(0, 0.1, shape).astype(np.float32)

    tensors = {"token_embd.weight": normal(VOCABULARY, HIDDEN), "output_norm.weight": normal(HIDDEN)}
    if not tied:
        tensors["output.weight"] = normal(VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        tensors |= {
            f"blk.{i}.attn_norm.weight": normal(HIDDEN),
            f"blk.{i}.attn_q.weight": normal(HIDDEN, HIDDEN),
            f"blk.{i}.attn_k.weight": normal(kv, HIDDEN),
            f"blk.{i}.attn_v.weight": normal(kv, HIDDEN),
            f"blk.{i}.attn_output.weight": normal(HIDDEN, HIDDEN),
            f"blk.{i}.ffn_norm.weight": normal(HIDDEN),
            f"blk.{i}.ffn_gate.weight": normal(INNER, HIDDEN),
            f"blk.{i}.ffn_up.weight": normal(INNER, HIDDEN),
            f"blk.{i}.ffn_down.weight": normal(HIDDEN, INNER),
        }
    return tensors


def stored_form(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """`values` as `kind` stores them; random blocks with tame scales for the K-quants, which gguf cannot write."""
    if kind.name in ("F32", "F16"):
        return values.astype(np.float32 if kind.name == "F32" else np.float16)
    if not kind.name.endswith("_K"):
        return gguf.quants.quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, blocks = values.shape[0], values.shape[1] // block
    data = np.random.default_rng(rows).integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    scale = np.array([0.003], np.float16).view(np.uint8)
    at = slice(size - 2, size) if kind.name == "Q6_K" else slice(0, 2)
    data[..., at] = scale
    if kind.name != "Q6_K":
        data[..., 2:4] = scale
    return data.reshape(rows, blocks * size)


WriteGguf = Callable[..., Path]


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGguf:
    """`write_gguf(kind="F32", architecture="llama", tied=False, fields={}, tensors={}, drop=())` writes a GGUF file.

    `fields` are extra metadata (key -> int, float, str, list); `tensors` extra tensors; `drop` names to leave out.
    """

    def write(
        kind: str = "F32",
        architecture: str = "llama",
        tied: bool = False,
        fields: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray] | None = None,
        drop: tuple[str, ...] = (),
        name: str = "model.gguf",
    ) -> Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_block_count(LAYERS)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_token_list([f"token{i}" for i in range(5000)])
        writer.add_eos_token_id(2)
        for key, value in (fields or {}).items():
            _add_field(writer, key, value)
        quantization = gguf.GGMLQuantizationType[kind]
        for tensor, values in {**_tensors(tied), **(tensors or {})}.items():
            if tensor in drop:
                continue
            matrix = values.ndim == 2
            used = quantization if matrix else gguf.GGMLQuantizationType.F32
            writer.add_tensor(tensor, stored_form(values, used), raw_dtype=used)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """`write_folder(config_overrides, tensors)` writes a Hugging Face folder; an override of ... drops the key."""

    def write(overrides: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        config = {key: value for key, value in {**CONFIG, **(overrides or {})}.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors or {"model.norm.weight": torch.arange(32.0)}, folder / "model.safetensors")
        return folder

    return write
