"""llm-compressor: round to nearest in compressed-tensors' forms. Needs llmcompressor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

_EIGHT: dict[str, Any] = {
    "targets": ["re:.*down_proj"],
    "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
}
_FOUR: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
}
CASES: dict[str, dict[str, Any]] = {
    "int4": {"targets": "Linear", "scheme": "W4A16"},
    "int4-64": {"config_groups": {"group_0": _FOUR}},
    "int4-zeros": {"targets": "Linear", "scheme": "W4A16_ASYM"},
    "int8": {"targets": "Linear", "scheme": "W8A8"},
    "fp8": {"targets": "Linear", "scheme": "FP8_DYNAMIC"},
    "fp8-block": {"targets": "Linear", "scheme": "FP8_BLOCK"},
    "mixed": {"config_groups": {"group_0": _FOUR, "group_1": _EIGHT}, "ignore": ["lm_head", "re:.*k_proj"]},
}


def quantize(case: str, source: Path, out: Path) -> None:
    """Writes `out`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    oneshot(model=model, recipe=QuantizationModifier(**{"ignore": ["lm_head"], **CASES[case]}))
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def load(folder: Path) -> Any:
    """The model as the tool runs it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
