"""What the benchmarks on GPUs compare, and the model folder that they serve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import gpu_services, rank_tokens
from bench.random_weights import RandomCheckpoint, hf_config, write_folder
from engine.batch import SampledToken
from engine.weights import open_checkpoint
from gateway.tokenizer import load_tokenizer
from tandem.record import TokenLogprobs


def test_sequences_are_compared_up_to_where_they_part() -> None:
    found = gpu_services.compared([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 2, 3], [4, 0, 6], [0, 8, 9]])
    assert found == {"sequences": 3, "same_tokens": 1, "parted_at": [1, 0]}


def drawn(token: int, second: int, apart: float) -> SampledToken:
    return SampledToken(token, TokenLogprobs(-0.1, (token, second), (-0.1, -0.1 - apart)))


def test_tokens_that_part_are_told_by_how_far_apart_they_were() -> None:
    alone = [[drawn(1, 2, 0.5), drawn(3, 4, 0.25)], [drawn(1, 2, 0.5), drawn(5, 6, 0.75)], [drawn(1, 9, 0.5)]]
    together = [[drawn(1, 2, 0.5), drawn(4, 3, 0.1)], [drawn(1, 2, 0.5), drawn(7, 6, 0.1)], [drawn(1, 8, 0.1)]]
    found = rank_tokens.compared(alone, together)
    assert found["same_tokens"] == 1
    assert found["parted_by_nats"] == [0.25, None]
    assert found["two_likeliest_apart_median"] == pytest.approx(0.5)


def test_a_folder_of_random_weights_is_a_model_with_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.random_weights.SHARD_BYTES", 20_000)
    write_folder("llama-tiny", tmp_path, "cpu")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    made, read = RandomCheckpoint("llama-tiny", "cpu"), open_checkpoint(tmp_path)
    try:
        assert hf_config(read.config) == hf_config(made.config)
        assert read.names() == made.names()
        for name in made.names():
            assert torch.equal(read.tensor(name), made.tensor(name).bfloat16())
    finally:
        read.close()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Guten Tag, wörld")) == "Guten Tag, wörld"
    assert tokenizer.decode([499]) == ""
