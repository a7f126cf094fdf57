"""The default model as the tools take it: a Hugging Face folder in bfloat16 with its tokenizer."""

from __future__ import annotations

from pathlib import Path

from bench.peers.hf_folder import convert
from tandem.models import resolve_model


def save_default(folder: Path) -> None:
    """Writes `folder`, within Tandem's environment."""
    from transformers import AutoTokenizer

    model = resolve_model("default")
    convert(model, folder)
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(folder)
