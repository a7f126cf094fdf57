"""Checkpoints that the quantising tools wrote, against what their own inference says (make quantized-data)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from conftest import MakeDriver

DATA = Path(__file__).parents[2] / "data" / "quantized"
FOLDERS = sorted(path.parent.name for path in DATA.glob("*/expected.safetensors"))


def logits_of(make_driver: MakeDriver, name: str, **settings: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the prompt and what followed it, beside what the tool said of them."""
    expected = load_file(DATA / name / "expected.safetensors")
    ids = torch.cat([expected["prompt"], expected["continuation"]])[:-1].tolist()
    return make_driver(DATA / name, **settings).run([ids], len(ids))[0], expected


def distance(one: Tensor, other: Tensor) -> float:
    """Relative, by the Euclidean norm."""
    return float((one - other).norm() / other.norm())


def rounds_activations(name: str) -> bool:
    """True for formats that quantise rows: a value between two codes rounds one way here and the other way there."""
    settings = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
    return any(group.get("input_activations") for group in settings.get("config_groups", {}).values())


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_and_tokens_are_the_tool_s(name: str, make_driver: MakeDriver, cpp_kernels: None) -> None:
    logits, expected = logits_of(make_driver, name)
    rows = (logits - expected["logits"]).norm(dim=1) / expected["logits"].norm(dim=1)
    if rounds_activations(name):
        # What rounds the other way once is in all rows that see it: those that don't are as near as without.
        assert int((rows < 1e-5).sum()) >= 4
        assert float(rows.max()) <= 5e-2
    else:
        assert distance(logits, expected["logits"]) <= 1e-4
    assert torch.equal(logits[len(expected["prompt"]) - 1 :].argmax(-1), expected["continuation"])


@pytest.mark.parametrize("name", [name for name in FOLDERS if not rounds_activations(name)])
def test_with_bfloat16_they_are_near(name: str, make_driver: MakeDriver, cpp_kernels: None) -> None:
    logits, expected = logits_of(make_driver, name, compute="bf16", dtype="bfloat16", kv_dtype="bfloat16")
    assert distance(logits, expected["logits"]) <= 3e-2


def test_every_form_is_there() -> None:
    assert len(FOLDERS) >= 15


@pytest.mark.parametrize("name", FOLDERS)
def test_what_tools_say_is_varied(name: str) -> None:
    """A model that repeats one token would hide wrong weights."""
    assert len(load_file(DATA / name / "expected.safetensors")["continuation"].unique()) >= 10
