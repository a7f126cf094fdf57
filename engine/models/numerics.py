"""The numerics id: two engines' results have the same bits only when theirs are equal. Part of every prefix hash."""

from __future__ import annotations

import torch

from engine.config import EngineConfig
from kernels import dispatch
from kernels.backends import Backend
from kernels.dispatch import Implementation
from tandem.kv_layout import ATTENTION_NUMERICS, KV_NUMERICS, RANK_NUMERICS

VERSION = 2
"""Raised when the transformer's order of operations changes."""


def numerics_id(engine_config: EngineConfig, kernels: Implementation, ranks: int = 1) -> str:
    """What decides a result's bits beside the model: compute, dtypes, kernels, torch (RoPE tables and bf16 products).

    `kernels` is `kernels.dispatch.select()`. Block size, batch, chunks and threads count with compute "bf16"
    only. So does the number of `ranks`, in whose order sums are, with computes that promise bits.
    """
    parts = (
        f"v{VERSION}",
        engine_config.compute,
        engine_config.dtype,
        f"{KV_NUMERICS}{engine_config.kv_dtype}",
        kernels.numerics,
        *([dispatch.int8_isa()] if engine_config.compute == "int8" and engine_config.device == "cpu" else []),
        *([f"{RANK_NUMERICS}{ranks}"] if ranks > 1 and engine_config.compute == "exact" else []),
        f"torch-{torch.__version__}",
    )
    return "/".join(parts)


def device_numerics_id(engine_config: EngineConfig, backend: Backend) -> str:
    """The same of an engine on a GPU, where the attention has a part of its own."""
    attention = f"{ATTENTION_NUMERICS}{backend.attention.numerics}"
    kernels = Implementation(backend.operations.name, f"{backend.operations.numerics}/{attention}", False)
    return numerics_id(engine_config, kernels)
