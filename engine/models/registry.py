"""The architectures that the one transformer covers, and what sets each apart. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tandem.errors import ModelFormatError


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a checkpoint's metadata leaves unsaid about one architecture."""

    name: str
    gguf_name: str | None
    """`general.architecture` in GGUF files; None: such models come under another name."""
    hf_model_type: str
    """`model_type` in config.json."""
    qkv_bias: bool | None = None
    """True: q, k and v always have biases; None: `attention_bias` in the config says."""
    qk_norm: bool = False
    gguf_permuted: bool = False
    """llama.cpp's converter reorders the rows of q and k, for rotation of neighbouring pairs."""
    default_head_dim: int | None = None
    """Head width when the config has none; None: hidden_size / num_heads."""


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", gguf_name="llama", hf_model_type="llama", gguf_permuted=True),
        Architecture("mistral", gguf_name=None, hf_model_type="mistral", qkv_bias=False),
        Architecture("qwen2", gguf_name="qwen2", hf_model_type="qwen2", qkv_bias=True),
        Architecture("qwen3", gguf_name="qwen3", hf_model_type="qwen3", qk_norm=True, default_head_dim=128),
    )
}


def gguf_architecture(name: str) -> Architecture:
    """The architecture of a GGUF file's `general.architecture`. Raises ModelFormatError naming the known ones."""
    known = {a.gguf_name: a for a in ARCHITECTURES.values() if a.gguf_name is not None}
    if name not in known:
        raise ModelFormatError(
            f"unknown architecture {name!r}; known in GGUF files: {', '.join(sorted(known))} (Mistral files say llama)",
            reason="UNKNOWN_ARCHITECTURE",
        )
    return known[name]


def hf_architecture(model_type: str) -> Architecture:
    """The architecture of a config.json's `model_type`. Raises ModelFormatError naming the known ones."""
    known = {a.hf_model_type: a for a in ARCHITECTURES.values()}
    if model_type not in known:
        raise ModelFormatError(
            f"unknown architecture {model_type!r}; known: {', '.join(sorted(known))}", reason="UNKNOWN_ARCHITECTURE"
        )
    return known[model_type]
