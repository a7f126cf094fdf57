"""AutoRound: its three packings, by its own rounding without tuning. Needs auto-round."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

CASES: dict[str, dict[str, Any]] = {
    "auto-round": {"format": "auto_round", "sym": False, "group_size": 64},
    "auto-round-gptq": {"format": "auto_round:auto_gptq", "sym": True, "group_size": 128},
    "auto-round-awq-64": {"format": "auto_round:auto_awq", "sym": False, "group_size": 64},
    "auto-round-awq": {"format": "auto_round:auto_awq", "sym": False, "group_size": 128},
}


def quantize(case: str, source: Path, out: Path) -> None:
    """Writes `out`."""
    settings = dict(CASES[case])
    form = settings.pop("format")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    rounding = AutoRound(model, tokenizer, bits=4, iters=0, disable_opt_rtn=True, device_map="cpu", **settings)
    part = out.with_name(out.name + ".part")
    rounding.quantize_and_save(output_dir=str(part), format=form)
    written = next(part.rglob("config.json")).parent  # a folder of the tool's own naming
    written.rename(out)
    shutil.rmtree(part, ignore_errors=True)


def load(folder: Path) -> Any:
    """The model in float32: the tool's CPU kernels take 16 bits only, so its own unpacking stands in."""
    config: Any = AutoConfig.from_pretrained(folder)
    settings = config.quantization_config
    del config.quantization_config
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith(".qweight")]:
        layer = name.removesuffix("qweight")
        words, zeros, scales = (state.pop(layer + part) for part in ("qweight", "qzeros", "scales"))
        state[layer + "weight"] = _weight(settings, words, zeros, scales.float()).T.contiguous()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def _weight(settings: Any, words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> Any:
    """A layer's weight [K, N]; GPTQ's packings through the tool's own layer, fed with unit vectors."""
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    bits, group, form = settings["bits"], settings["group_size"], settings["packing_format"]
    if form.endswith("awq"):
        return dequantize_gemm(words, zeros, scales, bits, group)
    module = qlinear_torch_zp if form.endswith("gptq") else qlinear_torch
    inputs = words.shape[0] * 32 // bits
    layer: Any = module.QuantLinear(bits, group, inputs, words.shape[1], bias=False)
    layer.qweight, layer.qzeros, layer.scales = words, zeros, scales
    return layer(torch.eye(inputs))
