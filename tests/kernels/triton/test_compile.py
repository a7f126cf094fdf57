"""GPU kernels compile for chips that are not here without spilling; the CPU path never meets triton."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CPU_PATH = "import engine.runner, decode_service.wiring, prefill_service.wiring, sys; print('triton' in sys.modules)"


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "gfx942"])
def test_representative_kernels_compile_and_fit(chip: str) -> None:
    """One kernel for each chip; `make gpu-table` compiles all of them for all."""
    command = [sys.executable, "-m", "bench.gpu_table", "--chip", chip, "--only", "attention, D 128"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {"_decode_split", "_decode_reduce", "_prefill"} <= {row["kernel"] for row in rows}
    assert all(row["chip"] == chip and row["fits"] for row in rows)
    assert any(row["wgmma"] for row in rows) == (chip == "sm_90")


def test_the_cpu_path_never_imports_triton() -> None:
    run = subprocess.run([sys.executable, "-c", CPU_PATH], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "False", run.stderr
