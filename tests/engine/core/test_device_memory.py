"""How many KV blocks a GPU gets: from free memory, a measured step and a margin; and what is said when it can't fit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from gpu_stand_in import Memory, device, load

from engine.config import BY_FREE_MEMORY
from engine.kv_cache import kv_bytes
from tandem.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")
LIMITS = {"num_blocks": BY_FREE_MEMORY, "max_context": 32, "max_sequences": 100, "max_step_tokens": 40}


def test_blocks_fill_what_a_step_and_the_margin_leave(tiny_model: Path) -> None:
    memory = Memory(total_bytes=1_000_000, free_bytes=500_000, peak_bytes=100_000)
    engine = load(tiny_model, device(memory=memory), graphs=False, **LIMITS)
    block, total = kv_bytes(engine.model_config, engine.engine_config)
    assert total == engine.kv_cache.tensor.nbytes
    assert total <= 500_000 - 100_000 - 30_000 < total + block
    assert memory.asked == ["reset", "peak"]
    graphs = load(tiny_model, device(memory=memory), **LIMITS)
    assert graphs.engine_config.num_blocks < engine.engine_config.num_blocks


def test_a_share_of_the_memory_is_not_overdrawn(tiny_model: Path) -> None:
    memory = Memory(total_bytes=1_000_000, free_bytes=900_000, peak_bytes=50_000, held_bytes=100_000)
    engine = load(tiny_model, device(memory=memory), graphs=False, gpu_share=0.5, **LIMITS)
    block, total = kv_bytes(engine.model_config, engine.engine_config)
    assert total <= 500_000 - 100_000 - 50_000 - 30_000 < total + block
    memory.free_bytes = 300_000  # another process has taken more than its own
    small = load(tiny_model, device(memory=memory), graphs=False, gpu_share=0.5, **LIMITS)
    assert small.kv_cache.tensor.nbytes <= 300_000 - 50_000 - 30_000
    with pytest.raises(ConfigError, match=r"--gpu-share 0\.1\b.*a larger --gpu-share"):
        load(tiny_model, device(memory=Memory(held_bytes=1 << 29)), gpu_share=0.1, **LIMITS)


def test_no_more_blocks_than_are_of_use(tiny_model: Path) -> None:
    engine = load(tiny_model, device(), **{**LIMITS, "max_sequences": 3})
    assert engine.engine_config.num_blocks == 3 * 32 // 4


def test_a_model_that_cannot_fit_is_said_with_the_numbers(tiny_model: Path) -> None:
    memory = Memory(total_bytes=3 << 30, free_bytes=1 << 30, peak_bytes=1 << 30)
    with pytest.raises(ConfigError, match=r"of 3\.00 GiB, 1\.00 are free .* a step of 40 tokens takes 1\.00") as caught:
        load(tiny_model, device(memory=memory), **LIMITS)
    assert "a sequence of 32 tokens takes 0.00" in str(caught.value)
    assert "--chunk-size" in str(caught.value)
