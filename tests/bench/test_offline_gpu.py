"""The GPU's bench with a CPU in its place: random weights without a file, and steps that are launched ahead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.gpu_speed import Rates
from bench.offline_gpu import measure, timed_replays
from bench.points import parse_point
from bench.random_weights import SHAPES, RandomCheckpoint, open_random
from bench.sequences import SequenceDriver
from engine.config import EngineConfig
from engine.device.device import CudaMemory, Device
from engine.loading import load_on_device
from engine.models.device_loader import weight_bytes
from tandem.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")
SHAPE = "random:llama-tiny"
GRAPH: Any = object()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SequenceDriver:
    monkeypatch.setenv("TANDEM_ATTENTION", "torch")  # the interpreter's is slow
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    checkpoint = open_random(SHAPE, "cpu")
    assert checkpoint is not None
    config = EngineConfig(
        SHAPE, "cuda", "native", "float32", "float32", num_blocks=64, max_step_tokens=64, max_sequences=4
    )
    device = Device(torch.device("cpu"), CudaMemory(), None)
    return SequenceDriver(load_on_device(checkpoint, "random", config, device), 64)


def test_steps_launched_ahead_draw_the_same_tokens(driver: SequenceDriver) -> None:
    drawn = []
    for ahead in (False, True):
        driver.rng.seed(1)
        with driver.sequences(3, 9) as sequences:
            driver.prefill(sequences)
            if ahead:
                assert len(driver.decode_ahead(sequences, 4)) == 4
                driver.decode_ahead(sequences, 2)
            else:
                for _ in range(6):
                    driver.decode(sequences)
            drawn.append([sequence.tokens[9:] for sequence in sequences])
            assert all(sequence.computed == 9 + 6 for sequence in sequences)
    assert drawn[0] == drawn[1]
    assert len({token for tokens in drawn[0] for token in tokens}) > 3


def test_points_have_figures_beside_floors(driver: SequenceDriver) -> None:
    rates = Rates(gb_per_s=100.0, tflops=1.0)
    decode = measure(driver, parse_point("tg2@16"), rates)
    assert "replay_ms" not in decode  # nothing is captured here
    assert decode["of_floor"] == pytest.approx(decode["floor_ms"] / decode["step_ms"])
    model = SHAPES["llama-tiny"]
    read = weight_bytes(model, driver.engine.engine_config) - 500 * 64 * 4  # not the table of embeddings
    kv = 2 * (16 + 64) * model.kv_elements_per_token * 4
    assert decode["floor_ms"] == pytest.approx((read + kv) / 100e6, rel=0.02)
    prefill = measure(driver, parse_point("pp2x8"), rates)
    assert prefill["of_peak"] == pytest.approx(prefill["tflops"])


def test_replays_are_timed_while_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed: list[object] = []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replayed.append)
    with timed_replays() as seconds:
        torch.cuda.CUDAGraph.replay(GRAPH)
        torch.cuda.CUDAGraph.replay(GRAPH)
    torch.cuda.CUDAGraph.replay(GRAPH)
    assert len(replayed) == 3
    assert len(seconds) == 2
    assert min(seconds) >= 0


def test_the_checkpoint_is_of_its_shape() -> None:
    checkpoint = RandomCheckpoint("llama-tiny", "cpu")
    weight = checkpoint.tensor("model.layers.1.mlp.up_proj.weight")
    assert weight.shape == (96, 64)
    assert weight.float().std() == pytest.approx(0.02, rel=0.1)
    assert (checkpoint.tensor("model.norm.weight") == 1).all()
    assert open_random("models/some.gguf", "cpu") is None
    with pytest.raises(ConfigError, match="unknown shape 'llama-9'; known: smol-135m, llama-1b, llama-3-8b"):
        open_random("random:llama-9", "cpu")
