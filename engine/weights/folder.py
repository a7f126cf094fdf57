"""Opening a Hugging Face folder, whether its weights are plain numbers or quantised."""

from __future__ import annotations

from pathlib import Path

from engine.weights.checkpoint import Checkpoint
from engine.weights.fields import Fields
from engine.weights.hf_config import read_json
from engine.weights.quantized_checkpoint import QuantizedCheckpoint
from engine.weights.quantized_config import quantization
from engine.weights.safetensors import SafetensorsCheckpoint


def open_folder(folder: Path) -> Checkpoint:
    """Open `folder`. Raises ModelFormatError as `open_checkpoint`."""
    plain = SafetensorsCheckpoint(folder)
    try:
        path = folder / "config.json"
        found = quantization(Fields(str(path), read_json(path)))
        return plain if found is None else QuantizedCheckpoint(plain, found)
    except BaseException:
        plain.close()
        raise
