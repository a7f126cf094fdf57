"""Which part of each weight a rank holds. Torch-free.

Products whose outputs are heads or inner columns are split by outputs, those that take these in by inputs; their
results are summed over the ranks. The vocabulary is padded to a multiple of the ranks and split by rows. Norms are
everybody's.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Final, Literal

from engine.config import ModelConfig
from tandem.errors import ConfigError

Split = Literal["rows", "columns", "vocabulary", "first", "whole"]
"""How a tensor is split; "first": rank 0 has all of it and the others zeros, since results are summed."""
SPLIT_COMPUTES: Final = ("exact", "bf16", "native")
"""`EngineConfig.compute` of several ranks."""
EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
_BY_ROWS: Final = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMNS: Final = ("o_proj", "down_proj")


def allowed_degrees(config: ModelConfig) -> list[int]:
    """Numbers of ranks that the model's KV heads and inner columns divide by."""
    common = gcd(config.num_kv_heads, config.intermediate_size)
    return [degree for degree in range(1, common + 1) if common % degree == 0]


def check_degree(config: ModelConfig, size: int) -> None:
    """Raises ConfigError, with the numbers that would do, unless `size` ranks can share the model."""
    if size not in (allowed := allowed_degrees(config)):
        raise ConfigError(
            f"WORLD_SIZE: {size} ranks can't have equal shares of {config.num_kv_heads} KV heads and "
            f"{config.intermediate_size} inner columns; allowed for this model: {', '.join(map(str, allowed))}"
        )


def vocabulary_part(vocabulary: int, size: int) -> int:
    """Rows of the embedding table and of the LM head that each rank holds; the last may have some of padding."""
    return -(-vocabulary // size)


def rank_config(config: ModelConfig, size: int) -> ModelConfig:
    """The model as one rank sees it. Raises ConfigError as `check_degree`."""
    check_degree(config, size)
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        intermediate_size=config.intermediate_size // size,
        vocab_size=vocabulary_part(config.vocab_size, size),
    )


def split_of(name: str) -> Split:
    """How the tensor `name` is split."""
    if name in (EMBEDDING, HEAD):
        return "vocabulary"
    layer, _, field = name.rpartition(".")
    part = layer.rpartition(".")[2]
    if part in _BY_ROWS:
        return "rows"
    if part in _BY_COLUMNS:
        return "columns" if field == "weight" else "first"
    return "whole"
