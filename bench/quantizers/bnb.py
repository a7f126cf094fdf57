"""bitsandbytes: 4-bit codes of its two tables, and 8 bits. Needs bitsandbytes and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

CASES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "bnb-8": {"load_in_8bit": True},
}


def quantize(case: str, source: Path, out: Path) -> None:
    """Writes `out`."""
    factory: Any = BitsAndBytesConfig
    config = factory(bnb_4bit_compute_dtype=torch.float32, **CASES[case])
    # The tool dequantises to the type that the weights had.
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def load(folder: Path) -> Any:
    """The model as the tool runs it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
