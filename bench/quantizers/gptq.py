"""GPTQModel: GPTQ, and AWQ, calibrated on a CPU. Needs gptqmodel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

from bench.quantizers.tiny import calibration

CASES: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 128},
    "gptq-ordered": {"bits": 4, "group_size": 32, "desc_act": True},
    "gptq-v2": {"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "gptq-2": {"bits": 2, "group_size": 32},
    "gptq-3": {"bits": 3, "group_size": 64},
    "gptq-8": {"bits": 8, "group_size": -1, "act_group_aware": False},
    "awq-64": {"bits": 4, "group_size": 64, "method": "awq", "format": "gemm", "sym": False},
    "awq": {"bits": 4, "group_size": 128, "method": "awq", "format": "gemm", "sym": False},
}
MANY = 16
FEW = {"awq-64": 2}
"""Samples of the default model's case: the tool's search over them takes a CPU most of an hour with more."""


def quantize(case: str, source: Path, out: Path) -> None:
    """Writes `out`."""
    model = GPTQModel.load(str(source), QuantizeConfig(device="cpu", **CASES[case]))
    texts = calibration(source, FEW.get(case, MANY))
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts]
    model.quantize(samples, batch_size=1)
    model.save(str(out))


def load(folder: Path) -> Any:
    """The model in float32: the tool's CPU kernels take 16 bits only, so its own dequantising stands in."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    awq = "awq" in folder.name
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    # float16 is what scales are stored in.
    model = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16).model
    for name, module in list(model.named_modules()):
        if not hasattr(module, "qweight"):
            continue
        module.scales = module.scales.float()
        parts = (module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
        weight = dequantize_gemm(*parts) if awq else module.dequantize_weight()
        plain = torch.nn.Linear(weight.shape[0], weight.shape[1], bias=False)
        plain.weight = torch.nn.Parameter(weight.T.float().contiguous())
        model.set_submodule(name, plain)
    return model.float()
