"""Compute int8: near the float model for all four architectures, and rows whose bits depend on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from row_promise import random_prompts, same_bits

from engine.config import EngineConfig
from engine.loading import load_engine, resolve
from engine.models.int8_loader import has_fine_down, load_int8_model
from engine.weights import open_checkpoint, read_config
from kernels import dispatch
from tandem.errors import ConfigError, ModelFormatError

pytestmark = pytest.mark.usefixtures("cpp_kernels")
SHAPE = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
        ("mistral", {"sliding_window": 9}),
        ("qwen2", {}),
        ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    ],
)
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "float8_e4m3"])
def test_is_near_the_float_model(
    kind: str, extra: dict[str, Any], kv_dtype: str, save_tiny: Callable[..., Any], make_driver: Callable[..., Any]
) -> None:
    folder, _ = save_tiny(kind, **{**SHAPE, **extra})
    prompts = random_prompts(3, 40, 211)
    exact = make_driver(folder, sequences=3, length=40).run(prompts, chunk=16)
    driver = make_driver(folder, sequences=3, length=40, compute="int8", kv_dtype=kv_dtype)
    for ours, theirs in zip(driver.run(prompts, chunk=16), exact, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < (0.1 if kv_dtype == "float8_e4m3" else 0.05)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8", "float8_e4m3"])
def test_rows_in_a_batch_and_in_chunks(
    kv_dtype: str, save_tiny: Callable[..., Any], make_driver: Callable[..., Any]
) -> None:
    folder, _ = save_tiny("qwen3", **SHAPE)
    prompts = [prompt[: 20 + n % 7] for n, prompt in enumerate(random_prompts(64, 30, 211))]
    driver = make_driver(folder, sequences=64, length=32, compute="int8", kv_dtype=kv_dtype)
    alone = [driver.run([prompt], chunk=64)[0] for prompt in prompts]
    for rows in (1, 2, 3, 7, 9, 16, 33, 64):
        for batched, single in zip(driver.run(prompts[:rows], chunk=1), alone[:rows], strict=True):
            assert same_bits(batched, single), rows
    for chunk, block_size in ((7, 4), (16, 32)):
        other = make_driver(folder, sequences=2, length=32, block_size=block_size, compute="int8", kv_dtype=kv_dtype)
        assert same_bits(other.run(prompts[:2], chunk)[1], alone[1])


def test_default_model(default_model_path: Any, default_driver: Any, make_driver: Callable[..., Any]) -> None:
    prompts = random_prompts(4, 80, 49152)
    driver = make_driver(default_model_path, sequences=4, length=96, compute="int8", kv_dtype="bfloat16")
    together = driver.run(prompts, chunk=16)
    exact = torch.cat(default_driver.run(prompts, chunk=512))
    assert float((torch.cat(together) - exact).norm() / exact.norm()) < 0.05
    for count in (1, 2):
        torch.set_num_threads(count)
        assert same_bits(driver.run(prompts[2:3], chunk=7)[0], together[2])
    most = 1.45 if dispatch.has_tiles() else 1.1  # AMX tiles take 8 bits a weight
    assert driver.model.nbytes < most * default_model_path.stat().st_size


def test_which_layers_are_fine() -> None:
    assert [index for index in range(30) if has_fine_down(index, 30)] == [0, 1, 2, 29]
    assert all(has_fine_down(index, 2) for index in range(2))


def test_auto_takes_int8_where_it_fits(save_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_fast_int8", lambda: True)
    fits, odd = save_tiny("llama", **SHAPE)[0], save_tiny("mistral", **{**SHAPE, "hidden_size": 80})[0]
    assert resolve({"model": fits}, read_config(fits)).compute == "int8"
    assert resolve({"model": fits, "dtype": "float32"}, read_config(fits)).compute == "exact"
    assert resolve({"model": odd}, read_config(odd)).compute == "exact"
    with pytest.raises(ConfigError, match="int8 can't be had: hidden 80"):
        resolve({"model": odd, "compute": "int8"}, read_config(odd))
    monkeypatch.setattr(dispatch, "has_fast_int8", lambda: False)
    assert resolve({"model": fits}, read_config(fits)).compute == "exact"
    assert resolve({"model": fits, "compute": "int8"}, read_config(fits)).compute == "int8"
    with dispatch.forced("torch"), pytest.raises(ConfigError, match="C\\+\\+ kernels"):
        resolve({"model": fits, "compute": "int8"}, read_config(fits))


def test_numerics_differ_by_compute(save_tiny: Callable[..., Any]) -> None:
    folder, _ = save_tiny("llama", **SHAPE)
    ids = {
        load_engine(resolve({"model": folder, "compute": compute, "num_blocks": 4}, read_config(folder))).numerics_id
        for compute in ("exact", "int8", "bf16")
    }
    assert len(ids) == 3


def test_a_tensor_that_is_missing_is_named(save_tiny: Callable[..., Any]) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = save_tiny("llama", **SHAPE)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ModelFormatError, match=r"layers\.1\.mlp\.up_proj"):
        load_int8_model(checkpoint, EngineConfig(model=str(folder), compute="int8"))
