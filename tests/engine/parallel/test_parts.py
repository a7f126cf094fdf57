"""What each rank reads of a model, and what is refused before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ModelConfig
from engine.loading import resolve
from engine.parallel.checkpoint import RankCheckpoint
from engine.parallel.codes import columns_of, rows_of
from engine.parallel.sharding import allowed_degrees, split_of
from engine.parallel.world import World, world_from
from engine.weights.checkpoint import open_checkpoint, read_config
from kernels.coded import CodedWeights, Rounding
from tandem.errors import ConfigError

WORLD = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_the_environment_says_which_rank() -> None:
    assert world_from({}) is world_from({**WORLD, "WORLD_SIZE": "1", "RANK": "0"}) is None
    assert world_from(WORLD) == World(1, 3, 1, "127.0.0.1", 29500)
    assert world_from({**WORLD, "RANK": "0", "LOCAL_RANK": ""}) == World(0, 3, 0, "127.0.0.1", 29500)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "many"),
        ("WORLD_SIZE", "65"),
        ("RANK", ""),
        ("RANK", "3"),
        ("RANK", "-1"),
        ("LOCAL_RANK", "3"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", ""),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", ""),
    ],
)
def test_a_wrong_environment_is_told_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: "):
        world_from({**WORLD, name: value})


def test_degrees_that_do_not_divide_are_refused_with_those_that_do(tiny_model: Path, default_model: Path) -> None:
    config = read_config(default_model)
    assert (config.num_heads, config.num_kv_heads, allowed_degrees(config)) == (9, 3, [1, 3])
    with pytest.raises(ConfigError, match=r"WORLD_SIZE: 2 ranks .* allowed for this model: 1, 3$"):
        resolve({"model": default_model}, config, 2)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE: 4 ranks .* allowed for this model: 1, 2$"):
        RankCheckpoint(open_checkpoint(tiny_model), 0, 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"compute": "int8", "device": "cpu"}, "compute: int8 can't"),
        ({"device": "cuda", "compute": "fp8"}, "fp8 can't"),
    ],
)
def test_what_is_not_split_is_refused(tiny_model: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve({"model": tiny_model, **settings}, read_config(tiny_model), 2)


def test_auto_is_the_layered_path(tiny_model: Path) -> None:
    config = resolve({"model": tiny_model, "device": "cpu"}, read_config(tiny_model), 2)
    assert config.compute == "exact"
    assert resolve({"model": tiny_model, "device": "cuda"}, read_config(tiny_model), 2).compute == "native"


def test_parts_make_the_whole(tiny_model: Path) -> None:
    whole = open_checkpoint(tiny_model)
    parts = [RankCheckpoint(whole, rank, 2) for rank in range(2)]
    axes = {"rows": 0, "vocabulary": 0, "columns": 1}
    assert {split_of(name) for name in whole.names()} == {*axes, "whole"}
    for name in whole.names():
        tensor, split = whole.tensor(name), split_of(name)
        read = [part.tensor(name) for part in parts]
        assert [tuple(one.shape) for one in read] == [part.shape(name) for part in parts]
        if split == "whole":
            assert all(torch.equal(one, tensor) for one in read)
            continue
        assert read[0].shape == read[1].shape
        joined = torch.cat(read, axes[split])
        assert torch.equal(joined[: tensor.shape[0]], tensor)
        assert not joined[tensor.shape[0] :].any(), "padding"
    assert parts[0].shape("model.embed_tokens.weight")[0] == 106


def test_a_bias_that_is_summed_counts_once() -> None:
    class Biased:
        config = ModelConfig("llama", 8, 4, 1, 2, 2, 8, 4, 1e-5, None, 16)  # type: ignore[arg-type]

        def tensor(self, name: str) -> torch.Tensor:
            return torch.arange(4.0)

        def shape(self, name: str) -> tuple[int, ...]:
            return (4,)

    parts: list[Any] = [RankCheckpoint(Biased(), rank, 2) for rank in range(2)]  # type: ignore[arg-type]
    down, up = ("model.layers.0.mlp.down_proj.bias", "model.layers.0.mlp.up_proj.bias")
    assert torch.equal(sum(part.tensor(down) for part in parts), torch.arange(4.0))
    assert torch.equal(torch.cat([part.tensor(up) for part in parts]), torch.arange(4.0))
    assert parts[1].shape(down) == (4,)
    assert parts[1].shape(up) == (2,)


def coded(group: int, **parts: Any) -> CodedWeights:
    """Random codes [6, 48]."""
    generator = torch.Generator().manual_seed(1)
    groups = -(-48 // group)
    codes = torch.randint(0, 16, (6, 48), generator=generator, dtype=torch.uint8)
    scales = torch.rand(6, groups, generator=generator) + 0.5
    return CodedWeights(codes, scales, group, bits=4, **parts)


ZEROS = torch.arange(18, dtype=torch.uint8).view(6, 3) % 16
FORMATS = {
    "groups": coded(16),
    "zeros": coded(16, zeros=ZEROS),
    "minima": coded(16, minima=ZEROS.float()),
    "table": coded(16, table=torch.linspace(-1, 1, 16)),
    "rows": coded(48),
    "across": coded(20),
    "ordered": coded(16, order=(torch.arange(48) % 3).int()),
    "rounded in groups": coded(16, rounding=Rounding("int8", group=8)),
    "rounded by one scale": coded(16, rounding=Rounding("fp8", scale=0.5)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_parts_of_codes_stand_for_parts_of_the_weight(name: str) -> None:
    weights, whole = FORMATS[name], FORMATS[name].dequantized()
    assert torch.equal(rows_of(weights, slice(2, 5), 3).dequantized(), whole[2:5])
    padded = rows_of(weights, slice(4, 6), 4).dequantized()
    assert torch.equal(padded[:2], whole[4:])
    assert not padded[2:].any()
    for columns in (slice(0, 24), slice(24, 48)):
        part = columns_of(weights, columns)
        assert part is not None
        assert torch.equal(part.dequantized(), whole[:, columns])
        assert part.codes.is_contiguous()


@pytest.mark.parametrize("rounding", [Rounding("int8"), Rounding("int8", group=16)])
def test_rows_that_are_rounded_as_a_whole_have_no_parts(rounding: Rounding) -> None:
    assert columns_of(coded(16, rounding=rounding), slice(24, 48)) is None
