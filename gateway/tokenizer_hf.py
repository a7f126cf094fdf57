"""Reads the tokenizer of a Hugging Face folder: tokenizer.json, tokenizer_config.json, chat_template.jinja,
config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from gateway.tokenizer import TextConfig
from tandem.errors import ModelFormatError


def load_folder(path: Path) -> tuple[tokenizers.Tokenizer, TextConfig]:
    """Raises ModelFormatError when tokenizer.json is missing or damaged."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelFormatError(f"{path}: the folder has no tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as exc:  # `tokenizers` raises bare Exception
        raise ModelFormatError(f"{file}: not a tokenizer ({exc})") from exc
    # Limits that a training run left behind must not cut prompts.
    backend.no_truncation()
    backend.no_padding()
    settings, model = _read(path / "tokenizer_config.json"), _read(path / "config.json")
    architectures = model.get("architectures") or [model.get("model_type", "")]
    return backend, TextConfig(
        name=path.resolve().name,
        architecture=str(architectures[0]),
        chat_template=_template(path, settings),
        bos_token=_token(settings.get("bos_token")),
        eos_token=_token(settings.get("eos_token")),
        max_context=int(model.get("max_position_embeddings") or 0),
    )


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError as exc:
        raise ModelFormatError(f"{file}: not JSON ({exc})") from exc
    return value if isinstance(value, dict) else {}


def _template(path: Path, settings: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token(value: Any) -> str:
    """A token is a string or an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
