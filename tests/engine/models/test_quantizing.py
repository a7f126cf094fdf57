"""`quantize_folder`: what it writes loads and is near, in one file or several; what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from quantized_folders import FORMATS, both_forms, save
from row_promise import random_prompts
from safetensors.torch import load_file

from engine import quantizing
from engine.describing import describe
from engine.quantizing import quantize_folder
from engine.weights import open_checkpoint
from engine.weights.rounding import FORMS
from kernels.coded import FP8
from tandem.errors import ConfigError, ModelFormatError

if TYPE_CHECKING:
    from conftest import MakeDriver

PROMPTS = random_prompts(1, 20, 97)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A plain model with a tokenizer's file beside it."""
    _, plain = both_forms(FORMATS["gptq"])
    folder = save(tmp_path / "plain", {name: tensor.bfloat16() for name, tensor in plain.items()})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("never copied")
    return folder


@pytest.mark.parametrize(("form", "near", "share"), [("int4", 0.3, 0.35), ("int8", 0.05, 0.55), ("fp8", 0.1, 0.55)])
def test_what_is_written_is_near(
    form: str, near: float, share: float, source: Path, tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None
) -> None:
    shown: list[tuple[int, int]] = []
    quantize_folder(source, tmp_path / "out", form, lambda *at: shown.append(at))
    assert shown == [(i + 1, 21) for i in range(21)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    one, other = (make_driver(folder).run(PROMPTS, 20)[0] for folder in (tmp_path / "out", source))
    assert 0 < float((one - other).norm() / other.norm()) < near
    layers = [t for t in open_checkpoint(tmp_path / "out").stored() if "_proj" in t.name]
    plain = sum(t.data.nbytes for t in open_checkpoint(source).stored() if "_proj" in t.name)
    assert sum(t.data.nbytes for t in layers) < plain * share


def test_codes_are_the_nearest() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    for name, dtype in (("int8", torch.int8), ("fp8", FP8)):
        codes, scales = FORMS[name](frozenset({128})).write(weight, torch.float32)
        assert codes.dtype is dtype
        steps = scales if name == "int8" else scales * codes.float().abs().clamp(min=2.0**-6) / 8
        # Half a step; what lies beyond the last code of int8 is at most one.
        assert bool(((codes.float() * scales - weight).abs() <= steps * (0.5001 if name == "fp8" else 1.0)).all())


def test_a_row_of_zeros_stays_zeros() -> None:
    for name in FORMS:
        codes, scales, *_ = FORMS[name](frozenset({32})).write(torch.zeros(2, 32), torch.bfloat16)
        assert bool((scales > 0).all())
        assert int(codes.view(torch.uint8).max()) == (0x88 if name == "int4" else 0)


def test_groups_divide_every_layer() -> None:
    assert FORMS["int4"](frozenset({256, 1024})).group == 128
    assert FORMS["int4"](frozenset({576, 1536})).group == 64
    assert FORMS["int4"](frozenset({72})).group is None


def test_large_models_are_written_in_shards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_driver: MakeDriver, cpp_kernels: None
) -> None:
    quantize_folder(source, tmp_path / "one", "int4")
    monkeypatch.setattr(quantizing, "SHARD_BYTES", 20_000)
    quantize_folder(source, tmp_path / "many", "int4")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["model.layers.1.mlp.up_proj.weight_packed"] == shards[-1].name
    one, many = (make_driver(tmp_path / name).run(PROMPTS, 20)[0] for name in ("one", "many"))
    assert torch.equal(one, many)


def test_refusals(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="'int5' is unknown; allowed: int4, int8, fp8"):
        quantize_folder(source, out, "int5")
    with pytest.raises(ConfigError, match="is there already"):
        quantize_folder(source, source, "int4")
    with pytest.raises(ConfigError, match="no Hugging Face folder"):
        quantize_folder(source / "config.json", out, "int4")
    quantize_folder(source, out, "int4")
    with pytest.raises(ConfigError, match="quantised already"):
        quantize_folder(out, tmp_path / "again", "int8")
    (source / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelFormatError, match="truncated"):
        quantize_folder(source, tmp_path / "again", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]


def test_what_can_t_be_rounded_is_named(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for wrong in (math.nan, -math.inf):
        broken = {**tensors, name: tensors[name].clone()}
        broken[name][3, 5] = wrong
        save(tmp_path / "broken", broken)
        with pytest.raises(ModelFormatError, match=f"tensor {name} holds numbers that are not finite"):
            quantize_folder(tmp_path / "broken", tmp_path / "out", "int8")
    save(tmp_path / "broken", {**tensors, "more": torch.ones(3).double()})
    with pytest.raises(ModelFormatError, match="tensor more has type F64; supported: F32"):
        quantize_folder(tmp_path / "broken", tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match=r"can't be written: .*No space left"):
        quantize_folder(source, tmp_path / "out", "fp8", stop)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_what_is_shown_of_it(source: Path, tmp_path: Path) -> None:
    quantize_folder(source, tmp_path / "out", "int4")
    facts = describe(tmp_path / "out")
    assert facts["parameters"] == describe(source)["parameters"] == 97 * 64 * 2 + 64 * 5 + 2 * 36864
    assert facts["quantised layers"] == {"int4, groups of 64": 14}
    assert facts["holds"] == "compressed-tensors: int4, groups of 64"
    assert "quantised layers" not in describe(source)
