"""Opening a Hugging Face folder, whether its weights are plain numbers or quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from engine.weights.checkpoint import Checkpoint
from engine.weights.fields import Fields
from engine.weights.hf_config import read_json
from engine.weights.quantized import Quantization
from engine.weights.quantized_checkpoint import CODES, QuantizedCheckpoint
from engine.weights.quantized_config import quantization
from engine.weights.safetensors import SafetensorsCheckpoint
from tandem.errors import ModelFormatError

OLDER_CONFIG: Final = "quantize_config.json"
"""Where AutoGPTQ put what later went into config.json too."""


def open_folder(folder: Path) -> Checkpoint:
    """Open `folder`. Raises ModelFormatError as `open_checkpoint`."""
    plain = SafetensorsCheckpoint(folder)
    try:
        path = folder / "config.json"
        codes = next((name for name in plain.names() if name.endswith(CODES)), None)
        found = quantization(Fields(str(path), read_json(path)))
        if found is None and codes is not None:
            found = _of_older_gptq(folder)
        if found is not None:
            return QuantizedCheckpoint(plain, found)
        if codes is not None:
            raise ModelFormatError(f"{path}: quantization_config is missing, and tensor {codes} is quantised")
        return plain
    except BaseException:
        plain.close()
        raise


def _of_older_gptq(folder: Path) -> Quantization | None:
    path = folder / OLDER_CONFIG
    if not path.is_file():
        return None
    return quantization(Fields(str(path), {"quantization_config": {"quant_method": "gptq", **read_json(path)}}))
