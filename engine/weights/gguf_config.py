"""The shape of a model from a GGUF file's metadata."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Final

from engine.config import ModelConfig, RopeConfig, RopeKind
from engine.models.registry import Architecture
from engine.weights.fields import Fields
from engine.weights.gguf_header import Header, TensorEntry
from tandem.errors import ModelFormatError

_SCALINGS: Final[dict[str, RopeKind]] = {"none": "default", "linear": "linear", "yarn": "yarn"}


def gguf_model_config(
    header: Header,
    architecture: Architecture,
    path: Path,
    frequency_factors: tuple[float, ...] | None,
) -> ModelConfig:
    """The model's shape; `frequency_factors` is the content of `rope_freqs.weight`, when there.

    Raises ModelFormatError naming the metadata key that is missing or wrong.
    """
    fields = Fields(str(path), header.fields, prefix=f"{architecture.gguf_name}.")
    _refuse_variants(fields, header)
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.error("attention.value_length", f"must equal the key length {head_dim}")
    layers = fields.integer("block_count", high=1 << 12)
    window, sliding_layers = _sliding(fields, layers)
    tokenizer = Fields(str(path), header.fields, prefix="tokenizer.ggml.")
    return ModelConfig(
        architecture=architecture.name,
        vocab_size=_embedding(header, path).shape[0],
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("feed_forward_length"),
        rms_eps=fields.positive("attention.layer_norm_rms_epsilon"),
        rope=_rope(fields, head_dim, frequency_factors),
        max_context=fields.integer("context_length"),
        sliding_window=window,
        sliding_layers=sliding_layers,
        tie_embeddings="output.weight" not in header.tensors,
        attention_bias="blk.0.attn_q.bias" in header.tensors,
        attention_output_bias="blk.0.attn_output.bias" in header.tensors,
        mlp_bias="blk.0.ffn_down.bias" in header.tensors,
        qk_norm=architecture.qk_norm,
        eos_token_ids=_end_tokens(tokenizer),
        bos_token_id=tokenizer.optional_integer("bos_token_id", low=0),
        quantization=_commonest_type(header),
        name=Fields(str(path), header.fields).text("general.name", path.stem),
    )


def _refuse_variants(fields: Fields, header: Header) -> None:
    """Same architecture name, another network: refused before it answers nonsense."""
    if fields.integer("expert_count", 0, low=0):
        raise fields.error("expert_count", "mixtures of experts are not supported")
    split = header.fields.get("split.count")
    if isinstance(split, int) and split > 1:
        raise ModelFormatError(
            f"{fields.source}: one of {split} parts; merge them first (llama.cpp's gguf-split --merge)"
        )


def _embedding(header: Header, path: Path) -> TensorEntry:
    entry = header.tensors.get("token_embd.weight")
    if entry is None or len(entry.shape) != 2:
        raise ModelFormatError(f"{path}: tensor token_embd.weight is missing")
    return entry


def _sliding(fields: Fields, layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
    window = fields.integer("attention.sliding_window", 0, low=0) or None
    pattern = fields.get("attention.sliding_window_pattern")
    if window is None or pattern is None:
        return window, None
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise fields.error("attention.sliding_window_pattern", f"must be a list of {layers} flags")
    return window, tuple(bool(flag) for flag in pattern)


def _end_tokens(tokenizer: Fields) -> tuple[int, ...]:
    """End of text, of turn and of message: each ends an answer."""
    found = [tokenizer.optional_integer(f"{key}_token_id", low=0) for key in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(i for i in found if i is not None))


def _rope(fields: Fields, head_dim: int, factors: tuple[float, ...] | None) -> RopeConfig:
    scaling = fields.text("rope.scaling.type", "linear" if fields.get("rope.scale_linear") is not None else "none")
    if scaling not in _SCALINGS:
        raise fields.error("rope.scaling.type", f"{scaling!r} is not supported; known: {', '.join(sorted(_SCALINGS))}")
    kind = _SCALINGS[scaling]
    factor = fields.positive("rope.scaling.factor", fields.positive("rope.scale_linear", 1.0))
    return RopeConfig(
        theta=fields.positive("rope.freq_base", 10000.0),
        rotary_dim=fields.integer("rope.dimension_count", head_dim),
        kind=kind,
        factor=factor if kind != "default" else 1.0,
        original_max_context=fields.integer("rope.scaling.original_context_length", fields.integer("context_length")),
        beta_fast=fields.positive("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.positive("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=_attention_factor(fields, factor) if kind == "yarn" else None,
        frequency_factors=factors,
    )


def _attention_factor(fields: Fields, factor: float) -> float | None:
    """llama.cpp multiplies its attention factor with the one derived from `factor`; None when the file has none."""
    if fields.number("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise fields.error("rope.scaling.yarn_ext_factor", "only 1 is supported")
    own = fields.optional_number("rope.scaling.yarn_attn_factor") or fields.optional_number("rope.scaling.attn_factor")
    return None if own is None else own * (1.0 + 0.1 * math.log(max(factor, 1.0)))


def _commonest_type(header: Header) -> str:
    sizes: Counter[str] = Counter()
    for entry in header.tensors.values():
        if len(entry.shape) > 1:
            sizes[entry.type.name] += math.prod(entry.shape)
    return sizes.most_common(1)[0][0] if sizes else "none"
