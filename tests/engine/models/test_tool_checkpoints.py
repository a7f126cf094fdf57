"""Checkpoints that the quantising tools wrote, against what their own inference says (make quantized-data)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.quantizers.tiny import save_tiny as save_model_of_the_tools
from engine.quantizing import quantize_folder
from engine.weights.quantized_codes import unpack
from kernels.coded import FP8

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
    groups = settings.get("config_groups", {}).values()
    return any(group.get("input_activations") for group in groups) or "DynamicActivation" in json.dumps(settings)


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


def said(config: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Of the tool's configuration what ours speaks of."""
    return {key: said(config[key], value) if isinstance(value, dict) else config[key] for key, value in ours.items()}


@pytest.mark.parametrize("form", ["int4", "int8", "fp8"])
def test_tandem_quantize_writes_what_the_tool_writes(form: str, tmp_path: Path) -> None:
    """From the model that the tool had: names, types, shapes, scales and settings, so whoever loads that loads this.

    The tool divides weights by scales in bfloat16, which puts some codes beside the nearest.
    """
    save_model_of_the_tools(tmp_path / "tiny")
    quantize_folder(tmp_path / "tiny", tmp_path / form, form)
    ours, theirs = (load_file(folder / form / "model.safetensors") for folder in (tmp_path, DATA))
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    for name, tensor in ours.items():
        other = theirs[name]
        if name.endswith("weight_packed"):
            tensor, other = unpack(tensor, 4, 128), unpack(other, 4, 128)
        if "_proj.weight" not in name or name.endswith(("_scale", "_shape")):
            assert torch.equal(tensor, other)
        elif tensor.dtype is FP8:
            steps = tensor.view(torch.uint8).int() - other.view(torch.uint8).int()
            assert int(steps.abs().max()) <= 1
        else:
            assert int((tensor.int() - other.int()).abs().max()) <= 1
    settings = [
        json.loads((folder / form / "config.json").read_text())["quantization_config"] for folder in (tmp_path, DATA)
    ]
    assert said(settings[1], settings[0]) == settings[0]


def test_fp8_in_blocks_is_what_transformers_makes_of_it(
    tmp_path: Path, save_tiny: Any, make_driver: MakeDriver, cpp_kernels: None
) -> None:
    """`quant_method` fp8, which transformers writes and reads; on a CPU it multiplies what the codes stand for."""
    from transformers import AutoModelForCausalLM

    folder, _ = save_tiny("llama", hidden_size=256, intermediate_size=384)
    file, config = folder / "model.safetensors", folder / "config.json"
    coded: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        if "_proj" not in name:
            coded[name] = tensor
            continue
        high, wide = (-(-side // 128) for side in tensor.shape)
        blocks = tensor.view(high, tensor.shape[0] // high, wide, 128)
        scales = blocks.abs().amax((1, 3)) / 448
        coded[name] = (blocks / scales[:, None, :, None]).view(tensor.shape).to(FP8)
        coded[f"{name}_scale_inv"] = scales
    save_file(coded, tmp_path / "written", metadata={"format": "pt"})
    (tmp_path / "written").rename(file)
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": fp8}))
    ids = torch.randint(2, 211, (1, 24), generator=torch.Generator().manual_seed(3))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(ids).logits[0]
    logits = make_driver(folder).run([ids[0].tolist()], 24)[0]
    assert distance(logits, expected) <= 1e-5
