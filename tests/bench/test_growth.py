"""How a decode step grows: floors, the page, and points through the real engine."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from bench.floors import Rates, StepWork, measure_rates, product_parameters, product_rate, read_rate, step_work
from bench.growth import Place, growth_row, load_driver, measure, parse_numbers, places, report, step_times
from bench.growth_page import page, write_page
from bench.sequences import SequenceDriver
from engine.config import EngineConfig, ModelConfig, RopeConfig
from kernels import dispatch
from tandem.errors import ConfigError

RATES = Rates(read_gb_per_s=10.0, product_gop_per_s=500.0)
MODEL = ModelConfig(
    architecture="llama",
    vocab_size=100,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=32,
    rms_eps=1e-5,
    rope=RopeConfig(theta=10000.0, rotary_dim=4),
    max_context=512,
)
ENGINE = EngineConfig("model", compute="int8", kv_dtype="bfloat16")
PARAMETERS = 2 * (16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 32 * 16) + 100 * 16
"""Two layers of q, k and v, output, and three of the MLP; then the head."""


def test_the_floor_is_the_larger_of_reading_and_multiplying() -> None:
    reads = StepWork(read_bytes=50_000_000, operations=1_000_000_000)
    assert (reads.memory_ms(RATES), reads.products_ms(RATES), reads.floor_ms(RATES)) == pytest.approx((5.0, 2.0, 5.0))
    multiplies = StepWork(read_bytes=50_000_000, operations=10_000_000_000)
    assert multiplies.floor_ms(RATES) == pytest.approx(20.0)


def test_weights_are_read_once_and_keys_and_values_for_every_sequence() -> None:
    kv_bytes_a_token = 2 * 2 * 2 * 4 * 2  # keys and values, layers, heads, elements, bytes
    assert step_work(MODEL, ENGINE, 1000, 3, 50).read_bytes == 1000 + 3 * 50 * kv_bytes_a_token
    wide = replace(ENGINE, kv_dtype="float32")
    assert step_work(MODEL, wide, 1000, 3, 50).read_bytes == 1000 + 3 * 50 * kv_bytes_a_token * 2


def test_every_sequence_multiplies_all_parameters_and_attends_to_its_context() -> None:
    assert product_parameters(MODEL) == PARAMETERS
    attention = 2 * 2 * 2 * 4 * 4 * 50  # two operations, scores and mixing, layers, heads, elements, tokens
    assert step_work(MODEL, ENGINE, 1000, 3, 50).operations == 3 * (2 * PARAMETERS + attention)


def test_a_layer_with_a_window_reads_no_more_than_that() -> None:
    windowed = replace(MODEL, sliding_window=20, sliding_layers=(True, False))
    assert step_work(windowed, ENGINE, 0, 1, 50).read_bytes == (20 + 50) * 2 * 2 * 4 * 2
    assert step_work(windowed, ENGINE, 0, 1, 10) == step_work(MODEL, ENGINE, 0, 1, 10)


def test_rates_are_bytes_and_operations_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.floors._best_seconds", lambda work, repeats: work() is not None and 0.001)
    assert read_rate(nbytes=4_000_000) == pytest.approx(4.0)
    assert product_rate(side=64, rows=4) == pytest.approx(2 * 4 * 64 * 64 / 0.001 / 1e9)


def test_a_row_has_the_median_the_fastest_step_and_how_far_the_floor_is() -> None:
    work = StepWork(read_bytes=50_000_000, operations=1_000_000_000)
    row = growth_row(Place("batch", 4, 128), [9.0, 10.0, 30.0], work, RATES)
    assert row == {
        "grows": "batch",
        "sequences": 4,
        "context": 128,
        "step_ms": 10.0,
        "min_ms": 9.0,
        "floor_ms": 5.0,
        "floor_memory_ms": 5.0,
        "floor_products_ms": 2.0,
        "times_floor": 2.0,
        "tokens_per_s": 400.0,
    }


def rows() -> list[Mapping[str, object]]:
    work = StepWork(read_bytes=50_000_000, operations=1_000_000_000)
    points = places([1, 64], [128, 8000])
    return [growth_row(place, [6.5 + number], work, RATES) for number, place in enumerate(points)]


def test_the_page_has_facts_rates_two_tables_and_two_charts(tmp_path: Path) -> None:
    write_page(tmp_path / "deep" / "growth.md", {"machine": "two cores"}, RATES, rows(), 24)
    text = (tmp_path / "deep" / "growth.md").read_text()
    assert "- machine: two cores" in text
    assert "**10.0 GB/s**" in text
    assert "**500 GOP/s**" in text
    assert "median of 24 steps" in text
    assert "| 64 | 7.5 | 7.5 | 5.0 | 5.0 | 2.0 | 1.5 | 8533.3 |" in text
    assert "| 8000 | 9.5 | 9.5 | 5.0 | 5.0 | 2.0 | 1.9 | 842.1 |" in text
    assert text.count("```mermaid\nxychart-beta\n") == 2
    assert (
        '    x-axis "sequences" ["1", "64"]\n    y-axis "milliseconds" 0 --> 8\n    line [6.50, 7.50]\n'
        "    line [5.00, 5.00]\n```" in text
    )


def test_printed_tables_are_whole_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(iter(rows()), RATES, as_json=False) == rows()
    text = capsys.readouterr().out
    assert "…" not in text
    assert "8533.3" in text
    assert "842.1" in text


def test_a_series_that_was_not_measured_is_not_on_the_page() -> None:
    text = page({}, RATES, [row for row in rows() if row["grows"] == "batch"], 24)
    assert "## With the batch" in text
    assert "## With the context" not in text


@pytest.mark.parametrize("text", ["0", "1,-2", "1,two", "1.5", "²"])
def test_lists_hold_whole_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match="--batches"):
        parse_numbers("--batches", text)


def test_one_series_may_be_empty_but_not_both() -> None:
    assert places([], parse_numbers("--contexts", "256, 512")) == [Place("context", 8, 256), Place("context", 8, 512)]
    with pytest.raises(ConfigError, match="nothing to measure"):
        places([], [])


POINTS = [Place("batch", 2, 8), Place("context", 3, 40)]


@pytest.fixture(scope="module")
def driver() -> Iterator[SequenceDriver]:
    """The default model, with room for POINTS."""
    yield load_driver("default", POINTS, 3, None)
    gc.unfreeze()  # loading froze what pytest holds, too


def test_points_through_the_engine(driver: SequenceDriver, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(measure(driver, POINTS, 3, RATES), RATES, as_json=True)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [{"read_gb_per_s": 10.0, "product_gop_per_s": 500.0}, *found]
    assert [(row["grows"], row["sequences"], row["context"]) for row in found] == [("batch", 2, 8), ("context", 3, 40)]
    assert all(0.0 < float(str(row["min_ms"])) <= float(str(row["step_ms"])) for row in found)
    # 99 MB of weights at 10 GB/s, or 135 where AMX tiles take 8 bits each; the tables of rotations, two more megabytes,
    # are not read.
    most = 13.9 if dispatch.has_tiles() else 10.2
    assert all(most - 0.7 < float(str(row["floor_memory_ms"])) < most for row in found)
    assert driver.pool.num_free == driver.pool.num_blocks


def test_blocks_are_free_after_a_step_that_failed(driver: SequenceDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SequenceDriver, sequences: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(SequenceDriver, "decode", fail)
    with pytest.raises(RuntimeError, match="broken"):
        step_times(driver, POINTS[0], 1)
    assert driver.pool.num_free == driver.pool.num_blocks


def test_progress_counts_every_prompt_token(driver: SequenceDriver) -> None:
    counted: list[int] = []
    assert len(step_times(driver, Place("context", 3, 400), 3, counted.append)) == 3
    assert counted == [512, 512, 176]


def test_a_context_that_the_model_does_not_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than the model's 8192 tokens"):
        load_driver("default", [Place("context", 1, 8180)], 24, None)
    gc.unfreeze()


def test_both_probes_run() -> None:
    rates = measure_rates()
    assert rates.read_gb_per_s > 0
    assert rates.product_gop_per_s > 0
