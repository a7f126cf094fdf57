"""What a model file holds and which kernels here would serve it, for `tandem models show`. Reads no weights."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from engine.loading import resolve
from engine.weights import open_checkpoint
from engine.weights.checkpoint import Checkpoint
from engine.weights.quantized_checkpoint import QuantizedCheckpoint
from kernels import dispatch


def describe(path: Path) -> dict[str, Any]:
    """Facts for people, JSON only. Raises ModelFormatError for a model that can't be read."""
    checkpoint = open_checkpoint(path)
    try:
        return {
            "parameters": sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names()),
            "holds": checkpoint.config.quantization,
            **_layers(checkpoint),
            "kernels": _kernels(checkpoint, path),
        }
    finally:
        checkpoint.close()


def _layers(checkpoint: Checkpoint) -> dict[str, Any]:
    """How many linear layers are stored in which way."""
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return {}
    counts = Counter(scheme.describe() for scheme in checkpoint.schemes.values())
    return {"quantised layers": dict(counts.most_common())}


def _kernels(checkpoint: Checkpoint, path: Path) -> str:
    """What compute auto means here for this model."""
    config = resolve({"model": str(path)}, checkpoint.config)
    compute = config.compute
    if config.device == "cuda":
        kept = ", codes as the file has them where a product takes such" if checkpoint.coding else ""
        return f"{compute} (a GPU's, {config.dtype}{kept})"
    implementation = dispatch.select().name
    if compute == "int8":
        return f"int8 ({'AMX tiles' if dispatch.has_tiles() else dispatch.int8_isa()})"
    kind = "codes expanded in the cache" if checkpoint.coding else "float32 products"
    return f"exact ({implementation}, {kind})"
