"""The shape of a model from a Hugging Face `config.json`, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from engine.config import ROPE_KINDS, ModelConfig, RopeConfig
from engine.models.registry import Architecture, hf_architecture
from engine.weights.fields import Fields
from tandem.errors import ModelFormatError

MAX_JSON_BYTES: Final = 100 << 20
DEFAULT_WINDOW: Final = 4096
"""What transformers takes when a config.json has no `sliding_window`; null means that there is none."""


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises ModelFormatError: missing, too large, not JSON, not an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFormatError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFormatError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFormatError(f"{path}: must hold a JSON object")
    return content


def hf_model_config(folder: Path, dtype: str) -> ModelConfig:
    """The model's shape from `folder`/config.json (and generation_config.json); `dtype` is the weights', for people.

    Raises ModelFormatError naming the key that is missing or wrong.
    """
    path = folder / "config.json"
    fields = Fields(str(path), read_json(path))
    architecture = _architecture(fields)
    _refuse_variants(fields)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", architecture.default_head_dim or hidden // heads)
    layers = fields.integer("num_hidden_layers", high=1 << 12)
    bias = fields.boolean("attention_bias", False)
    window, sliding_layers = _sliding(fields, architecture, layers)
    rope, max_context = _rope(fields, head_dim)
    return ModelConfig(
        architecture=architecture.name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        rms_eps=fields.positive("rms_norm_eps", 1e-6),
        rope=rope,
        max_context=max_context,
        sliding_window=window,
        sliding_layers=sliding_layers,
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=bias if architecture.qkv_bias is None else architecture.qkv_bias,
        attention_output_bias=bias and architecture.qkv_bias is None,
        mlp_bias=fields.boolean("mlp_bias", False),
        qk_norm=architecture.qk_norm,
        eos_token_ids=_end_tokens(folder, fields),
        bos_token_id=fields.optional_integer("bos_token_id", low=0),
        quantization=dtype,
        name=folder.resolve().name,
    )


def _architecture(fields: Fields) -> Architecture:
    try:
        return hf_architecture(fields.text("model_type"))
    except ModelFormatError as error:
        if error.reason != "UNKNOWN_ARCHITECTURE":
            raise
        raise ModelFormatError(f"{fields.source}: {error.message}", reason=error.reason) from None


def _refuse_variants(fields: Fields) -> None:
    """What the transformer here does not compute."""
    activation = fields.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise fields.error("hidden_act", f"{activation!r} is not supported; known: silu")


def _sliding(fields: Fields, architecture: Architecture, layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
    """The window, and the layers that have it (None: all)."""
    qwen = architecture.name in ("qwen2", "qwen3")
    if architecture.name == "llama" or (qwen and not fields.boolean("use_sliding_window", False)):
        return None, None
    window = fields.optional_integer("sliding_window") if "sliding_window" in fields.values else DEFAULT_WINDOW
    if window is None or not qwen:
        return window, None
    first = fields.integer("max_window_layers", 28, low=0)
    types = fields.get("layer_types")
    if types is None:
        return window, tuple(layer >= first for layer in range(layers))
    known = {"full_attention", "sliding_attention"}
    if not isinstance(types, list) or len(types) != layers or not all(isinstance(t, str) and t in known for t in types):
        raise fields.error("layer_types", f"must be a list of {layers} of {', '.join(sorted(known))}")
    return window, tuple(t == "sliding_attention" for t in types)


def _end_tokens(folder: Path, fields: Fields) -> tuple[int, ...]:
    """The ids of config.json and generation_config.json: chat models often name the end of turn only in the second."""
    ids = fields.token_ids("eos_token_id")
    path = folder / "generation_config.json"
    if path.exists():
        ids += Fields(str(path), read_json(path)).token_ids("eos_token_id")
    return tuple(dict.fromkeys(ids))


def _rope(fields: Fields, head_dim: int) -> tuple[RopeConfig, int]:
    """RoPE settings and the context in tokens that they reach."""
    scaling = _scaling(fields)
    named = scaling.text("rope_type", scaling.text("type", "default"))
    kind = next((k for k in ROPE_KINDS if k == named), None)
    if kind is None:
        raise scaling.error("rope_type", f"{named!r} is not supported; known: {', '.join(ROPE_KINDS)}")
    positions = fields.integer("max_position_embeddings")
    original = scaling.integer(
        "original_max_position_embeddings", fields.integer("original_max_position_embeddings", positions)
    )
    if kind in ("linear", "llama3") and scaling.get("factor") is None:
        raise scaling.error("factor", "is missing")
    factor = scaling.positive("factor", positions / original) if kind != "default" else 1.0
    partial = scaling.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if not 0 < partial <= 1:
        raise fields.error("partial_rotary_factor", f"must be over 0 and at most 1, not {partial}")
    rope = RopeConfig(
        theta=scaling.positive("rope_theta", fields.positive("rope_theta", 10000.0)),
        rotary_dim=int(head_dim * partial),
        kind=kind,
        factor=factor,
        original_max_context=original,
        low_freq_factor=scaling.positive("low_freq_factor", 1.0),
        high_freq_factor=scaling.positive("high_freq_factor", 4.0),
        beta_fast=scaling.positive("beta_fast", 32.0),
        beta_slow=scaling.positive("beta_slow", 1.0),
        attention_factor=scaling.optional_number("attention_factor"),
        mscale=scaling.optional_number("mscale"),
        mscale_all_dim=scaling.optional_number("mscale_all_dim"),
        truncate=scaling.boolean("truncate", True),
    )
    # A config with yarn may still say the length before scaling (Qwen2.5's does).
    return rope, max(positions, int(original * factor)) if kind == "yarn" else positions


def _scaling(fields: Fields) -> Fields:
    """`rope_scaling` (transformers 4), else `rope_parameters` (transformers 5), else nothing; empty is nothing.

    transformers takes them in this order when a file has both.
    """
    for key in ("rope_scaling", "rope_parameters"):
        value = fields.get(key)
        if not value:
            continue
        if not isinstance(value, Mapping):
            raise fields.error(key, "must be an object")
        if any(isinstance(v, Mapping) for v in value.values()):
            raise fields.error(key, "settings per layer are not supported")
        return Fields(f"{fields.source}: {key}", value)
    return Fields(fields.source, {})
