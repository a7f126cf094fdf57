"""Memory while loading, one copy of tied weights, the numerics id, RoPE factors from GGUF."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig, RopeConfig
from engine.models.numerics import numerics_id
from engine.models.rope import inverse_frequencies, rope_tables
from kernels.dispatch import Implementation
from tandem.errors import InternalError

MEASURE = """
import sys
from engine.config import EngineConfig
from engine.models.loader import load_model
from engine.weights import open_checkpoint
from kernels import dispatch

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

dispatch.forced("cpp").__enter__()
before = kilobytes("VmRSS")
checkpoint = open_checkpoint(sys.argv[1])
model = load_model(checkpoint, EngineConfig(model=sys.argv[1], threads=2))
checkpoint.close()
largest = model.config.vocab_size * model.config.hidden_size * 4
print(kilobytes("VmHWM") - before, kilobytes("VmRSS") - before, model.nbytes // 1024, largest // 1024)
"""


def test_peak_memory_of_the_default_model(default_model_path: Path) -> None:
    """Codes stay codes. The peak is the packed weights and the largest tensor, what stays the weights: within 80 MB."""
    command = [sys.executable, "-c", MEASURE, str(default_model_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    peak, after, packed, largest = map(int, answer.split())
    assert 95_000 < packed < 105_000
    assert peak < packed + largest + 80_000
    assert after < packed + 80_000


def test_tied_weights_are_stored_once(save_tiny: Callable[..., Any], make_driver: Callable[..., Any]) -> None:
    """Embedding rows come from the packed LM head, exactly, and ids outside the vocabulary are refused."""
    folder, reference = save_tiny("llama", tie_word_embeddings=True)
    model = make_driver(folder).model
    assert model.embedding.nbytes == 0
    ids = torch.tensor([0, 63, 64, 210, 5, 5])
    assert torch.equal(model.embedding(ids), reference.model.embed_tokens.weight[ids])
    for bad in (-1, 211, 250):
        with pytest.raises(InternalError, match=r"within \[0, 211\)"):
            model.embedding(torch.tensor([0, bad]))


def test_numerics_id() -> None:
    """Whatever may change a bit is in the id; what may not is not."""
    config = EngineConfig(model="m")
    cpp = Implementation("cpp", "cpp1-avx512", row_invariant=True)
    base = numerics_id(config, cpp)
    for change in ({"dtype": "bfloat16"}, {"kv_dtype": "bfloat16"}, {"compute": "bf16"}):
        assert numerics_id(dataclasses.replace(config, **change), cpp) != base
    assert numerics_id(config, Implementation("torch", "torch-2", row_invariant=False)) != base
    same = dataclasses.replace(config, block_size=4, num_blocks=9, max_step_tokens=7, threads=1, max_sequences=2)
    assert numerics_id(same, cpp) == base


def test_gguf_factors_equal_llama3_scaling() -> None:
    """llama.cpp stores Llama 3.1's scaling as divisors of the frequencies."""
    llama3 = RopeConfig(
        theta=500000.0,
        rotary_dim=64,
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_context=8192,
    )
    expected, _ = inverse_frequencies(llama3)
    plain, _ = inverse_frequencies(RopeConfig(theta=500000.0, rotary_dim=64))
    divisors = tuple((plain / expected).tolist())
    assert min(divisors) == 1.0
    assert max(divisors) == pytest.approx(8.0)
    found, _ = inverse_frequencies(RopeConfig(theta=500000.0, rotary_dim=64, frequency_factors=divisors))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_tables_do_not_depend_on_their_length() -> None:
    """A worker with a shorter context has the same bits."""
    rope = RopeConfig(theta=10000.0, rotary_dim=24)
    long, short = rope_tables(rope, 5000), rope_tables(rope, 4100)
    assert long[0].shape == (5000, 12)
    assert torch.equal(long[0][:4100], short[0])
    assert torch.equal(long[1][:4100], short[1])
