"""Settings become a frozen EngineConfig, or a ConfigError with the key and what is allowed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from engine import config
from engine.config import (
    BY_FREE_MEMORY,
    DEFAULT_NUM_BLOCKS,
    EngineConfig,
    ModelConfig,
    RopeConfig,
    resolve_engine_config,
)
from tandem.errors import ConfigError
from tandem.kv_layout import KvLayout

MODEL = ModelConfig(
    architecture="llama",
    vocab_size=100,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    rms_eps=1e-5,
    rope=RopeConfig(theta=1e4, rotary_dim=16),
    max_context=1000,
)


def _resolve(shape: ModelConfig | None = None, **settings: Any) -> EngineConfig:
    return resolve_engine_config({"model": "m.gguf", **settings}, shape)


def test_automatic_values() -> None:
    """Nothing said: exact float32; bf16 products bring bf16 weights and cache with them."""
    assert _resolve() == EngineConfig(model="m.gguf")
    assert _resolve(compute="auto", dtype=None, num_blocks="auto") == EngineConfig(model="m.gguf")
    fast = _resolve(compute="bf16")
    assert (fast.compute, fast.dtype, fast.kv_dtype) == ("bf16", "bfloat16", "bfloat16")
    assert _resolve(compute="exact", dtype="bf16").dtype == "bfloat16"
    assert _resolve(compute="bf16", kv_dtype="float32").kv_dtype == "float32"


@pytest.mark.parametrize(
    ("said", "meant"),
    [("int8", "int8"), ("fp8_e4m3", "float8_e4m3"), ("float8_e4m3", "float8_e4m3"), ("fp8", "float8_e4m3")],
)
def test_quantized_blocks_have_their_scales(said: str, meant: str) -> None:
    """2 x 2 layers x 2 heads x 16 slots: 16 bytes of codes and 4 of scale each; as transfers count them."""
    resolved = _resolve(kv_dtype=said)
    assert resolved.kv_dtype == meant
    assert resolved.block_bytes(MODEL) == 2 * 2 * 2 * 16 * (16 + 4)
    assert resolved.kv_token_bytes(MODEL) * 16 == resolved.block_bytes(MODEL)
    odd = dataclasses.replace(MODEL, num_layers=1, num_kv_heads=1, head_dim=1)
    for model, size in ((MODEL, 16), (odd, 3)):
        ours = _resolve(kv_dtype=said, block_size=size)
        layout = KvLayout(size, meant, model.num_layers, model.num_kv_heads, model.head_dim)
        assert (ours.scales_at(model), ours.block_bytes(model)) == (layout.scales_at, layout.block_bytes)


def test_blocks_follow_memory() -> None:
    """2 x 2 layers x 2 heads x 16 wide x 4 bytes x 16 slots: 8,192 bytes a block."""
    assert _resolve().block_bytes(MODEL) == 8192
    assert _resolve(shape=MODEL, kv_memory=100_000).num_blocks == 12
    assert _resolve(shape=MODEL, num_blocks=5).num_blocks == 5
    # No more than all sequences at full length need: 3 x 63 blocks.
    assert _resolve(shape=MODEL, max_sequences=3).num_blocks == 189
    assert _resolve(shape=MODEL, max_sequences=3, max_context=32).num_blocks == 6
    assert _resolve().num_blocks == DEFAULT_NUM_BLOCKS


def test_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a large machine a small container gets a small cache; "max" and files that aren't there mean no limit."""
    limits = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    monkeypatch.setattr(config, "CGROUP_LIMITS", tuple(map(str, limits)))
    wide = dataclasses.replace(MODEL, max_context=1 << 20)
    free = _resolve(shape=wide, max_sequences=4096).num_blocks
    limits[0].write_text("max\n")
    assert _resolve(shape=wide, max_sequences=4096).num_blocks == free
    for number, limit in enumerate(limits, 1):
        limit.write_text(f"{8192 * 8 * 100 // number}\n")
        assert _resolve(shape=wide, max_sequences=4096).num_blocks == 100 // number


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"colour": "red"}, "unknown setting 'colour'; known: attention, block_size, compute"),
        ({"model": ""}, "model: must be the path"),
        ({"compute": "int4"}, "compute: 'int4' is not one of auto, exact, bf16, int8"),
        ({"compute": "int8", "dtype": "float32"}, "dtype: compute int8 holds weights in 4 or 8 bits"),
        ({"dtype": "float8"}, "dtype: 'float8' is not one of auto, float32, bfloat16"),
        ({"kv_dtype": "int4"}, "kv_dtype: 'int4' is not one of"),
        ({"compute": "bf16", "dtype": "float32"}, "dtype: compute bf16 holds weights in bfloat16"),
        ({"device": "gpu"}, "device: 'gpu' is not one of auto, cpu, cuda"),
        ({"device": "cuda", "compute": "exact"}, "compute: 'exact' is not one of auto, native, fp8, int8, int4"),
        ({"compute": "fp8"}, "compute: 'fp8' is not one of auto, exact, bf16, int8"),
        (
            {"device": "cuda", "dtype": "float16", "kv_dtype": "bf16"},
            "kv_dtype: on a GPU keys and values have the dtype of activations, float16, or are int8 or fp8_e4m3",
        ),
        ({"device": "cuda", "kv_dtype": "int4"}, "kv_dtype: 'int4' is not one of"),
        ({"dtype": "float16"}, "dtype: 'float16' is not one of auto, float32, bfloat16"),
        ({"graphs": "yes"}, "graphs: 'yes' is not true or false"),
        ({"gpu_share": 0.0}, "gpu_share: 0.0 is not a number over 0, at most 1"),
        ({"gpu_share": float("nan")}, "gpu_share: nan is not"),
        ({"gpu_share": True}, "gpu_share: True is not"),
        ({"device": "cuda", "attention": "flash"}, "attention: 'flash' is not one of auto, flashinfer, flash-attn-3"),
        ({"attention": "flashinfer"}, "attention: flashinfer is for GPUs; on a CPU leave attention auto"),
        ({"block_size": 0}, "block_size: 0 is not an integer between 1 and 256"),
        ({"block_size": True}, "block_size: True is not an integer"),
        ({"max_step_tokens": "many"}, "max_step_tokens: 'many' is not an integer"),
        ({"prefix_cache": "no"}, "prefix_cache: 'no' is not true or false"),
        ({"share_weights": 1}, "share_weights: 1 is not true or false"),
        ({"threads": 0}, "threads: 0 is not an integer between 1 and 1024"),
        ({"num_blocks": 5, "kv_memory": 5}, "give num_blocks or kv_memory, not both"),
        ({"kv_memory": 5}, "kv_memory: needs the model's shape"),
    ],
)
def test_bad_values(settings: dict[str, Any], message: str) -> None:
    """The key's name and the allowed values."""
    with pytest.raises(ConfigError, match=message):
        _resolve(**settings)


def test_too_little_memory() -> None:
    """Less than one block."""
    with pytest.raises(ConfigError, match="kv_memory: 8191 bytes hold no block; one block takes 8192 bytes"):
        _resolve(shape=MODEL, kv_memory=8191)


def test_windows_and_limits() -> None:
    """A layer's window, and the context that is served."""
    windowed = dataclasses.replace(MODEL, sliding_window=8)
    assert [windowed.layer_window(i) for i in (0, 1)] == [8, 8]
    some = dataclasses.replace(windowed, sliding_layers=(False, True))
    assert [some.layer_window(i) for i in (0, 1)] == [None, 8]
    assert MODEL.layer_window(0) is None
    assert _resolve(max_context=10).context_limit(MODEL) == 10
    assert _resolve(max_context=5000).context_limit(MODEL) == 1000
    with pytest.raises(dataclasses.FrozenInstanceError):
        windowed.sliding_window = 9  # type: ignore[misc]


def test_a_gpu_computes_in_sixteen_bits() -> None:
    """And leaves the number of blocks to its memory."""
    config = _resolve(device="cuda")
    assert (config.device, config.compute, config.dtype, config.kv_dtype) == ("cuda", "native", "bfloat16", "bfloat16")
    assert config.num_blocks == BY_FREE_MEMORY
    assert (config.max_step_tokens, config.max_sequences) == (8192, 256)
    assert _resolve(device="cuda", num_blocks=7, dtype="fp16").kv_dtype == "float16"
    assert _resolve(device="cuda", dtype="fp16", kv_dtype="f16").kv_dtype == "float16"
    assert _resolve(device="cuda", kv_dtype="int8").kv_dtype == "int8"
    assert _resolve(device="cuda", kv_dtype="fp8", dtype="fp16").kv_dtype == "float8_e4m3"
    assert _resolve(device="cuda", num_blocks=7).num_blocks == 7
    assert _resolve(device="cuda", compute="int4").compute == "int4"
    assert (config.gpu_share, _resolve(device="cuda", gpu_share=0.5).gpu_share) == (1.0, 0.5)
    assert _resolve(device="auto").device == "cpu"
    assert resolve_engine_config({"model": "m"}, found="cuda").device == "cuda"
    assert resolve_engine_config({"model": "m", "device": "cpu"}, found="cuda").compute == "exact"
