"""`tandem models`: look at model files. Reads headers; the engine, asked in a process of its own, knows the kernels."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tandem.errors import ModelFormatError
from tandem.models import resolve_model, verify_default
from tandem.supervisor.settings import environment

MAX_HEADER_BYTES = 256 << 20

Tensors = Iterator[tuple[str, int]]
"""Number format and element count of each tensor."""


@click.group("models")
def command() -> None:
    """Look at model files."""


@command.command("path")
@click.argument("model", default="default")
def path(model: str) -> None:
    """Print the path that MODEL (default, PATH or hub:ORG/NAME) stands for."""
    print(resolve_model(model))


@command.command("verify")
def verify() -> None:
    """Check the default model's SHA-256."""
    print(f"{verify_default()}: SHA-256 as expected")


@command.command("show")
@click.argument("model", default="default")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(model: str, as_json: bool) -> None:
    """Show what is in MODEL, a GGUF file or a folder with config.json and safetensors, and which kernels serve it."""
    found = resolve_model(model)
    facts = describe(found)
    facts |= engine_facts(found)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{count} x {name}" for name, count in value.items())
        print(f"{key:{width}}  {value}")


def describe(path: Path) -> dict[str, Any]:
    """Facts of a model by what its headers say. Raises ModelFormatError when it isn't one."""
    facts: dict[str, Any] = {"path": str(path)}
    try:
        facts |= _describe_folder(path) if path.is_dir() else _describe_gguf(path)
    except ModelFormatError:
        raise
    except (OSError, ValueError, KeyError, IndexError, TypeError) as exc:
        raise ModelFormatError(f"{path} can't be read as a model, it is damaged or truncated: {exc}") from exc
    return facts


def engine_facts(path: Path) -> dict[str, Any]:
    """What the engine says of a model: true parameters, how layers are stored, kernels. Raises ModelFormatError."""
    words = [sys.executable, "-P", "-m", "engine", "describe", str(path)]
    done = subprocess.run(  # noqa: S603  # our own module
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment(), check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ModelFormatError(lines[-1].removeprefix("error: "))
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def _describe_gguf(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelFormatError(f"{path} is neither a GGUF file nor a folder with safetensors")
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def field(name: str) -> Any:
        found = reader.get_field(name)
        return None if found is None else found.contents()

    architecture = field("general.architecture")
    vocabulary = reader.get_field("tokenizer.ggml.tokens")
    return {
        "format": "GGUF",
        "name": field("general.name"),
        "architecture": architecture,
        "context": field(f"{architecture}.context_length"),
        "layers": field(f"{architecture}.block_count"),
        "width": field(f"{architecture}.embedding_length"),
        "heads": field(f"{architecture}.attention.head_count"),
        "kv heads": field(f"{architecture}.attention.head_count_kv"),
        "vocabulary": len(vocabulary.data) if vocabulary is not None else None,
        "chat template": field("tokenizer.chat_template") is not None,
        "licence": field("general.license"),
        **_count((tensor.tensor_type.name, int(tensor.n_elements)) for tensor in reader.tensors),
        "bytes": path.stat().st_size,
    }


def _describe_folder(path: Path) -> dict[str, Any]:
    files = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not files:
        raise ModelFormatError(f"{path} holds no config.json with *.safetensors beside it")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return {
        "format": f"safetensors ({len(files)} {'file' if len(files) == 1 else 'files'})",
        "name": config.get("_name_or_path") or path.name,
        "architecture": config.get("model_type"),
        "context": config.get("max_position_embeddings"),
        "layers": config.get("num_hidden_layers"),
        "width": config.get("hidden_size"),
        "heads": config.get("num_attention_heads"),
        "kv heads": config.get("num_key_value_heads"),
        "vocabulary": config.get("vocab_size"),
        "tokenizer": (path / "tokenizer.json").is_file(),
        **_count(entry for file in files for entry in _safetensors_header(file)),
        "bytes": sum(file.stat().st_size for file in files),
    }


def _safetensors_header(path: Path) -> Tensors:
    """The file starts with the header's length (8 bytes, little-endian) and the header, JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, path.stat().st_size):
            raise ModelFormatError(f"{path} is truncated or not a safetensors file")
        header = json.loads(file.read(length))
    return ((tensor["dtype"], math.prod(tensor["shape"])) for name, tensor in header.items() if name != "__metadata__")


def _count(tensors: Tensors) -> dict[str, Any]:
    formats: Counter[str] = Counter()
    parameters = 0
    for name, elements in tensors:
        formats[name] += 1
        parameters += elements
    return {"parameters": parameters, "tensors": dict(formats.most_common())}
