"""What a decode step can't be faster than: what it must read and multiply, at rates measured here by tiny probes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.config import EngineConfig, ModelConfig
from kernels.int8 import GROUP, ZEROS, GroupWeights, int8_linear, pack_int8

PROBE_BYTES = 1 << 30
PROBE_REPEATS = 8
PRODUCT_SIDE = 2048
"""A weight of this side takes 2.6 MB in 4 bits: it stays in the caches of two cores, and each thread has work."""
PRODUCT_ROWS = 64
PRODUCT_BITS = 4
PRODUCT_REPEATS = 100


@dataclass(frozen=True, slots=True)
class Rates:
    """What this machine did in the probes, each the best of its repeats, by all threads that torch has."""

    read_gb_per_s: float
    """Summing a float32 tensor of 1 GiB, which no cache holds."""
    product_gop_per_s: float
    """Our own int8 product of 64 rows with a weight that the caches hold. Not the chip's peak: that is higher."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one decode step must do, however it is written."""

    read_bytes: int
    operations: int

    def memory_ms(self, rates: Rates) -> float:
        """Milliseconds to read it all once."""
        return self.read_bytes / rates.read_gb_per_s / 1e6

    def products_ms(self, rates: Rates) -> float:
        """Milliseconds to multiply and add it all."""
        return self.operations / rates.product_gop_per_s / 1e6

    def floor_ms(self, rates: Rates) -> float:
        """The larger of both: they can overlap, at best in full."""
        return max(self.memory_ms(rates), self.products_ms(rates))


def step_work(
    model: ModelConfig, engine: EngineConfig, weight_bytes: int, sequences: int, context_tokens: int
) -> StepWork:
    """The work of a step in which each of `sequences` sees `context_tokens` tokens.

    Weights are read once. Operations are two for each parameter of the products and sequence, and attention's four for
    each element of its query heads and token; all at one rate, though attention computes in bfloat16: a floor.
    """
    windows = (model.layer_window(layer) for layer in range(model.num_layers))
    seen = sum(context_tokens if window is None else min(window, context_tokens) for window in windows)
    kv_bytes = engine.kv_token_bytes(model) // model.num_layers
    attention = 4 * model.num_heads * model.head_dim * seen
    return StepWork(
        read_bytes=weight_bytes + sequences * seen * kv_bytes,
        operations=sequences * (2 * product_parameters(model) + attention),
    )


def product_parameters(model: ModelConfig) -> int:
    """Elements of all weights that a row is multiplied with, the head's among them."""
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim * model.hidden_size
    mlp = 3 * model.hidden_size * model.intermediate_size
    return model.num_layers * (attention + mlp) + model.vocab_size * model.hidden_size


def measure_rates() -> Rates:
    """Runs both probes; about a second."""
    return Rates(read_rate(), product_rate())


def read_rate(nbytes: int = PROBE_BYTES, repeats: int = PROBE_REPEATS) -> float:
    """GB/s of summing a tensor of `nbytes`."""
    memory = torch.ones(nbytes // 4)
    return nbytes / _best_seconds(memory.sum, repeats) / 1e9


def product_rate(side: int = PRODUCT_SIDE, rows: int = PRODUCT_ROWS, repeats: int = PRODUCT_REPEATS) -> float:
    """1e9 operations a second of `int8_linear` over and over with one weight [side, side] of 4 bits."""
    codes = torch.full((side, side), ZEROS[PRODUCT_BITS] + 1, dtype=torch.uint8)
    groups = torch.full((side, -(-side // GROUP)), 0.01)
    packed = pack_int8([GroupWeights(PRODUCT_BITS, codes, groups, groups)])
    x = torch.ones(rows, side)
    return 2 * rows * side * side / _best_seconds(lambda: int8_linear(x, packed), repeats) / 1e9


def _best_seconds(work: Callable[[], object], repeats: int) -> float:
    """The shortest of `repeats` times: a probe says what the machine can do, not what it did when disturbed."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
