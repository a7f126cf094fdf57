"""The model in parts, each rank a thread: the whole's logits, for every architecture and way to store weights."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from quantized_folders import FORMATS, both_forms, compressed, save
from row_promise import random_prompts, same_bits
from thread_ranks import Meeting, ThreadRanks
from torch import Tensor

from engine.models.loader import load_model
from engine.parallel.checkpoint import RankCheckpoint
from engine.parallel.layers import over_ranks
from engine.weights import open_checkpoint
from tandem.errors import ConfigError

if TYPE_CHECKING:
    from conftest import Driver, MakeDriver

SIZE = 2


def drivers_of(folder: Path, make_driver: MakeDriver, **settings: Any) -> tuple[Driver, list[Driver]]:
    """One for the whole, one for each rank."""
    whole = make_driver(folder, sequences=2, **settings)
    checkpoint, meeting = open_checkpoint(folder), Meeting(SIZE)
    ranks = []
    for rank in range(SIZE):
        part = load_model(RankCheckpoint(checkpoint, rank, SIZE), whole.engine)
        model = over_ranks(part, ThreadRanks(rank, meeting), checkpoint.config.vocab_size)
        ranks.append(replace(whole, model=model))
    checkpoint.close()
    return whole, ranks


def run_ranks(ranks: list[Driver], prompts: list[list[int]], chunk: int) -> list[Tensor]:
    """Logits as rank 0 has them; the others have the same."""

    def run(driver: Driver) -> list[Tensor]:
        torch.set_num_threads(1)
        return driver.run(prompts, chunk)

    with ThreadPoolExecutor(SIZE) as pool:
        first, *others = pool.map(run, ranks)
    for other in others:
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))
    return first


def check(whole: Driver, ranks: list[Driver], vocabulary: int) -> None:
    """Logits near the whole's; the same bits in chunks of any length and alone."""
    prompts = random_prompts(2, 20, vocabulary)
    expected, found = whole.run(prompts, 7), run_ranks(ranks, prompts, 7)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
    alone = run_ranks(ranks, prompts[:1], 20)
    assert same_bits(alone[0], found[0])
    assert sum(driver.model.nbytes for driver in ranks) < 1.4 * whole.model.nbytes


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_architectures(
    kind: str, tied: bool, save_tiny: Callable[..., tuple[Path, Any]], make_driver: MakeDriver, cpp_kernels: None
) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    folder, _ = save_tiny(kind, tie_word_embeddings=tied, head_dim=16, **biases)
    check(*drivers_of(folder, make_driver), 211)


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3", "bfloat16"])
def test_kv_dtypes(
    kv_dtype: str, save_tiny: Callable[..., tuple[Path, Any]], make_driver: MakeDriver, cpp_kernels: None
) -> None:
    """Scales of codes are a head's own, so a rank's are the whole's; rounding makes more of another order of sums."""
    folder, _ = save_tiny("llama")
    whole, ranks = drivers_of(folder, make_driver, kv_dtype=kv_dtype)
    prompts = random_prompts(2, 20, 211)
    for one, other in zip(run_ranks(ranks, prompts, 7), whole.run(prompts, 7), strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02


def test_bf16_is_near(save_tiny: Callable[..., tuple[Path, Any]], make_driver: MakeDriver) -> None:
    folder, _ = save_tiny("qwen3", head_dim=16)
    whole, ranks = drivers_of(folder, make_driver, compute="bf16", dtype="bfloat16")
    prompts = random_prompts(2, 20, 211)
    for one, other in zip(run_ranks(ranks, prompts, 7), whole.run(prompts, 7), strict=True):
        assert float((one - other).norm() / other.norm()) < 0.05


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_folders(name: str, tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None) -> None:
    coded, _ = both_forms(FORMATS[name])
    check(*drivers_of(save(tmp_path / "coded", coded, FORMATS[name].config), make_driver), 97)


def test_rows_rounded_as_a_whole_are_refused_by_name(tmp_path: Path, make_driver: MakeDriver) -> None:
    coded, _ = both_forms(FORMATS["int8-row"])
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config = compressed("int-quantized", num_bits=8, strategy="channel", group_size=None)
    config["config_groups"]["group_0"]["input_activations"] = inputs
    folder = save(tmp_path / "coded", coded, config)
    with pytest.raises(ConfigError, match=r"(o|down)_proj\.weight \(compressed-tensors.*WORLD_SIZE 1 only"):
        drivers_of(folder, make_driver)
