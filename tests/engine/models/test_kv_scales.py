"""Scales of keys and values from the checkpoint: used for 8-bit floats, left aside otherwise, refused when broken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from row_promise import random_prompts, same_bits
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.models.loader import load_model
from engine.weights import model_id, open_checkpoint
from tandem.errors import ModelFormatError

SHAPE = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "num_attention_heads": 4}
SCALES = {
    f"model.layers.{layer}.self_attn.{part}_scale": torch.tensor([0.01 * (layer + 1) + offset])
    for layer in range(3)
    for part, offset in (("k", 0.0), ("v", 0.005))
}


@pytest.fixture
def tiny(save_tiny: Callable[..., Any]) -> Path:
    folder, _ = save_tiny("llama", **SHAPE)
    return Path(folder)


def with_tensors(folder: Path, added: dict[str, torch.Tensor]) -> Path:
    file, written = folder / "model.safetensors", folder / "written"
    save_file({**load_file(file), **added}, written, metadata={"format": "pt"})
    written.rename(file)  # what was loaded may still lie in the old file's map
    return folder


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_they_stand_in_the_blocks(tiny: Path, make_driver: Callable[..., Any], compute: str) -> None:
    driver = make_driver(with_tensors(tiny, SCALES), length=48, compute=compute, kv_dtype="float8_e4m3")
    cache = KVCache(driver.model.config, driver.engine)
    driver.model.step(
        torch.tensor([3, 4, 5]), driver._meta([(0, 0, 3)]), cache, torch.arange(3)
    )  # three slots of the sequence's first block, which is the pool's last
    assert cache.scales is not None
    written = cache.scales[-1, :, :, :, :3].amax((2, 3)), cache.scales[-1, :, :, :, :3].amin((2, 3))
    assert torch.equal(written[0], torch.tensor(list(SCALES.values())).view(3, 2))
    assert torch.equal(written[0], written[1])
    assert not cache.scales[:-1].any()


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_results_are_near(tiny: Path, make_driver: Callable[..., Any], compute: str) -> None:
    """Scales that fit: the largest key and value are about 4 here, and 448 codes of 0.01 reach that."""
    prompts = random_prompts(2, 40, 211)
    given = {"sequences": 2, "length": 48, "compute": compute}
    exact = make_driver(tiny, **given).run(prompts, chunk=16)
    own = make_driver(tiny, **given, kv_dtype="float8_e4m3").run(prompts, chunk=16)
    folder = with_tensors(tiny, SCALES)
    fixed = make_driver(folder, **given, kv_dtype="float8_e4m3").run(prompts, chunk=16)
    again = make_driver(folder, **given, kv_dtype="float8_e4m3").run(prompts, chunk=7)
    for one, other, third, fourth in zip(exact, own, fixed, again, strict=True):
        assert not same_bits(other, third)
        assert same_bits(third, fourth)
        assert float((third - one).norm() / one.norm()) < 0.1


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_other_caches_leave_them_aside(tiny: Path, make_driver: Callable[..., Any], kv_dtype: str) -> None:
    prompts = random_prompts(1, 20, 211)
    before = make_driver(tiny, kv_dtype=kv_dtype).run(prompts, chunk=20)[0]
    first_id = model_id(tiny)
    with_tensors(tiny, SCALES)
    assert same_bits(make_driver(tiny, kv_dtype=kv_dtype).run(prompts, chunk=20)[0], before)
    assert model_id(tiny) != first_id


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"k_scale": torch.tensor([0.1])}, "v_scale is missing"),
        ({"k_scale": torch.tensor([0.1]), "v_scale": torch.zeros(1)}, "v_scale must be one positive number"),
        ({"k_scale": torch.tensor([torch.nan]), "v_scale": torch.ones(1)}, "k_scale must be one positive number"),
        ({"k_scale": torch.ones(2), "v_scale": torch.ones(1)}, r"k_scale must be one positive number.*\(2,\)"),
    ],
)
def test_broken_ones_are_refused(tiny: Path, broken: dict[str, torch.Tensor], message: str) -> None:
    folder = with_tensors(tiny, {f"model.layers.1.self_attn.{name}": tensor for name, tensor in broken.items()})
    with pytest.raises(ModelFormatError, match=message):
        load_model(open_checkpoint(folder), EngineConfig(str(folder), kv_dtype="float8_e4m3"))


def test_an_older_spelling(tiny: Path, make_driver: Callable[..., Any]) -> None:
    """compressed-tensors once wrote them as those of the products' outputs."""
    older = {name.replace("_scale", "_proj.output_scale"): scale for name, scale in SCALES.items()}
    last = "model.layers.0.self_attn.v_proj.output_scale"
    folders = []
    for number, scales in enumerate((SCALES, older, {n: s for n, s in older.items() if n != last})):
        folders.append(with_tensors(Path(shutil.copytree(tiny, tiny.with_name(str(number)))), scales))
    prompts = random_prompts(1, 20, 211)
    one, other = (make_driver(f, kv_dtype="float8_e4m3").run(prompts, chunk=20)[0] for f in folders[:2])
    assert same_bits(one, other)
    with pytest.raises(ModelFormatError, match=f"tensor {last} is missing"):
        load_model(open_checkpoint(folders[2]), EngineConfig(str(tiny), kv_dtype="float8_e4m3"))
