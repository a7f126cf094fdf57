from __future__ import annotations

from bench.conversion import rows_of
from tandem.kv_layout import KvLayout


def test_every_pair_is_measured() -> None:
    rows = rows_of(KvLayout(16, "bfloat16", num_layers=1, num_kv_heads=1, head_dim=4), 50, runs=1)
    assert [row["pools"] for row in rows][:2] == ["equal", "16 to 32"]
    assert all(isinstance(row["ms"], float) and row["ms"] >= 0 for row in rows)
