"""`bench.offline` on a GPU: each point beside what the GPU can do at most, measured a moment before.

A decode step must read all weights and the cached keys and values once: its floor is that at the rate of a copy. A
prefill must do the products of every row, and attention's: its floor is that at the rate of torch's own product. Decode
steps overlap: each is launched while the one before runs. `host_ms` is what a launch takes the host, with the step's
arrays, their copy and the results'; `replay_ms`, a part of it, is the replay of the captured graph alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from bench.floors import product_parameters, step_work
from bench.gpu_speed import Rates, measure_rates
from bench.points import Point
from bench.sequences import SequenceDriver

WARM_STEPS = 8


def measure_points(driver: SequenceDriver, points: Sequence[Point], runs: int) -> Iterator[dict[str, object]]:
    """One row for each point; figures are medians over `runs`."""
    start = time.perf_counter()
    driver.engine.runner.warm_up()
    torch.cuda.synchronize()
    warm = time.perf_counter() - start
    rates = measure_rates("cuda")
    config = driver.engine.engine_config
    yield {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model": driver.engine.model_config.name,
        "numerics": driver.engine.numerics_id,
        "graphs": config.graphs,
        "warm_up_s": round(warm, 2),
        "copy_gb_per_s": round(rates.gb_per_s),
        "product_tflops": round(rates.tflops),
        "memory_gib": round(torch.cuda.max_memory_reserved() / 2**30, 1),
    }
    for point in points:
        rows = [measure(driver, point, rates) for _ in range(runs if point.output_tokens else runs + 1)]
        yield {"point": point.name, **_median(rows if point.output_tokens else rows[1:])}


def measure(driver: SequenceDriver, point: Point, rates: Rates) -> dict[str, Any]:
    """One run of one point."""
    with driver.sequences(point.sequences, point.prompt_tokens) as sequences:
        torch.cuda.synchronize()
        start = time.perf_counter()
        driver.prefill(sequences)
        seconds = time.perf_counter() - start
        if not point.output_tokens:
            return _prefill_row(driver, point, rates, seconds)
        driver.decode_ahead(sequences, WARM_STEPS)
        steps = point.output_tokens - WARM_STEPS
        start = time.perf_counter()
        with timed_replays() as replays:
            launches = driver.decode_ahead(sequences, steps)
        seconds = (time.perf_counter() - start) / steps
    engine = driver.engine
    context = point.prompt_tokens + point.output_tokens // 2
    work = step_work(engine.model_config, engine.engine_config, _read_bytes(driver), point.sequences, context)
    floor = work.read_bytes / rates.gb_per_s / 1e6
    figures = {
        "tokens_per_s": point.sequences / seconds,
        "step_ms": seconds * 1e3,
        "floor_ms": floor,
        "of_floor": floor / (seconds * 1e3),
        "host_ms": statistics.median(launches) * 1e3,
    }
    return figures | ({"replay_ms": statistics.median(replays) * 1e3} if replays else {})


@contextmanager
def timed_replays() -> Iterator[list[float]]:
    """The seconds that each replay of a graph takes the host meanwhile; empty where steps are eager."""
    seconds: list[float] = []
    replay = torch.cuda.CUDAGraph.replay

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        start = time.perf_counter()
        replay(graph)
        seconds.append(time.perf_counter() - start)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", timed):
        yield seconds


def _prefill_row(driver: SequenceDriver, point: Point, rates: Rates, seconds: float) -> dict[str, Any]:
    config = driver.engine.model_config
    tokens = point.sequences * point.prompt_tokens
    head = config.vocab_size * config.hidden_size  # multiplies one row a prompt only
    products = 2 * (tokens * (product_parameters(config) - head) + point.sequences * head)
    pairs = point.sequences * point.prompt_tokens * (point.prompt_tokens + 1) / 2
    attention = 4 * pairs * config.num_heads * config.head_dim * config.num_layers
    tflops = (products + attention) / seconds / 1e12
    return {"tokens_per_s": tokens / seconds, "tflops": tflops, "of_peak": tflops / rates.tflops}


def _read_bytes(driver: SequenceDriver) -> int:
    """Bytes of weights that a decode step reads in full: not the table of embeddings, nor rotations."""
    model: Any = driver.engine.runner.model
    return int(model.nbytes - model.embedding.nbytes - model.cos.nbytes - model.sin.nbytes)


def _median(rows: Sequence[dict[str, Any]]) -> dict[str, object]:
    return {name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]} | {"runs": len(rows)}
