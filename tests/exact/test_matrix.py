"""That CI's selection of the matrix covers what it says: it can't be thinned out unnoticed."""

from __future__ import annotations

import importlib.util
import sys
from itertools import combinations, product
from pathlib import Path

AXES = {
    "chunk_size": (1, 7, 64, 512),
    "transport": ("shm", "grpc"),
    "concurrency": (1, 16),
    "prefix_cache": (True, False),
    "workers": (1, 2),
    "preempt": (False, True),
}


_spec = importlib.util.spec_from_file_location("tandem_exact_matrix_itself", Path(__file__).with_name("matrix.py"))
assert _spec is not None
assert _spec.loader is not None
matrix = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = matrix  # dataclasses look their module up
_spec.loader.exec_module(matrix)
SELECTED = [matrix.BASELINE, *(row for row in matrix.PAIRWISE if row.prefill)]


def test_every_pair_of_values_is_in_a_selected_row() -> None:
    """One sequence alone never gives way, so that pair is nowhere."""
    for first, second in combinations(AXES, 2):
        for pair in product(AXES[first], AXES[second]):
            if {first: pair[0], second: pair[1]} == {"concurrency": 1, "preempt": True}:
                continue
            found = [row for row in SELECTED if (getattr(row, first), getattr(row, second)) == pair]
            assert found, f"{first}={pair[0]} with {second}={pair[1]}"


def test_every_value_runs_with_all_prompts() -> None:
    """But chunk size 1, which CI gives prompts of up to 64 tokens."""
    whole = [row for row in SELECTED if row.pick == "all"]
    for axis, values in AXES.items():
        assert {getattr(row, axis) for row in whole} | ({1} if axis == "chunk_size" else set()) >= set(values), axis


def test_preemption_rows_run_at_once_in_a_tight_pool() -> None:
    prompts = [[0] * 60] * 24
    for row in [*matrix.PAIRWISE, *matrix.FULL]:
        if row.preempt:
            assert row.concurrency > 1
            assert row.tight_pool(prompts) < row.concurrency // row.workers * (60 + row.greedy) // matrix.BLOCK_SIZE


def test_each_compute_has_a_row_with_blocks_of_two_sizes() -> None:
    """24 and 16: neither divides the other, and only 16 has pairs."""
    for rows in (matrix.PAIRWISE, matrix.INT8):
        assert any(row.prefill and row.prefill_block_size % matrix.BLOCK_SIZE for row in rows)


def test_what_others_are_compared_with_is_drawn_one_by_one() -> None:
    """And each compute has rows that verify every draft, at 1 and at 16 of compute exact."""
    assert matrix.BASELINE.speculation == matrix.INT8[0].speculation == "off"
    assert all(row.speculation != "off" for row in [*matrix.PAIRWISE, *matrix.INT8[1:], *matrix.FULL])
    assert {row.concurrency for row in matrix.PAIRWISE if row.speculation == "fixed" and row.pick == "all"} == {1, 16}
    assert any(row.speculation == "fixed" for row in matrix.INT8)


def test_the_full_matrix_is_full() -> None:
    """Every combination that means something, and the aggregated mode; all prompts unless that can't preempt."""
    rows = [matrix.BASELINE, *matrix.FULL]
    assert len(set(rows)) == len(rows) == 1 + 96 + 3 + 2
    assert all((row.greedy, row.sampled) == (64, 32) for row in rows)
    assert all(row.pick == "all" for row in rows if not row.preempt)
    assert sum(row.pick == "all" for row in rows if row.preempt) == 8
