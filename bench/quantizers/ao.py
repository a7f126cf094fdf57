"""torchao, by way of transformers: 8 bits of weights, alone or of rows too. Needs torchao and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchao import quantization
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

TYPES: Any = torch  # whose stubs know no int4
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "torchao-int8": ("Int8WeightOnlyConfig", {}),
    "torchao-w8a8": ("Int8DynamicActivationInt8WeightConfig", {}),
    "torchao-fp8": ("Float8WeightOnlyConfig", {}),
    "torchao-intx": (
        "IntxWeightOnlyConfig",
        {"weight_dtype": TYPES.int4, "granularity": quantization.PerGroup(32)},
    ),
}


def quantize(case: str, source: Path, out: Path) -> None:
    """Writes `out`, in float32 but for the codes: what is computed is of the type that weights had."""
    kind, settings = CASES[case]
    config: Any = TorchAoConfig(getattr(quantization, kind)(**settings))
    model: Any = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def load(folder: Path) -> Any:
    """The model as the tool runs it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
