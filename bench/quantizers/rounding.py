"""AutoRound: its three packings, by its own rounding without tuning. Needs auto-round."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

CASES: dict[str, dict[str, Any]] = {
    "auto-round": {"format": "auto_round", "sym": False, "group_size": 64},
    "auto-round-gptq": {"format": "auto_round:auto_gptq", "sym": True, "group_size": 128},
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
    """The model as the tool runs it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
