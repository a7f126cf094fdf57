"""GPU kernels compile for chips that are not here without spilling; the CPU path never meets triton."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

CPU_PATH = "import engine.runner, decode_service.wiring, prefill_service.wiring, sys; print('triton' in sys.modules)"


REPRESENTATIVE = {
    "sm_80": {"prefill attention, D 64": "_prefill"},
    "sm_90": {
        "decode attention, D 64": "_decode_split",
        "prefill attention, D 64": "_prefill",
        "rope and KV write, D 64": "_rope_and_store",
        "sampling, float32": "_draw",
        "product fp8 in blocks, 2048": "_scaled_linear",
        "product 4-bit weights, groups of 32": "_group_linear",
    },
    "gfx942": {"product int8, 16": "_scaled_linear"},
}


@pytest.mark.parametrize("chip", list(REPRESENTATIVE))
def test_kernels_compile_and_fit(chip: str) -> None:
    """Some variants; `make gpu-table` compiles all for all chips."""
    command = [sys.executable, "-m", "bench.gpu_table", "--chip", chip]
    for name in REPRESENTATIVE[chip]:
        command += ["--only", name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert set(REPRESENTATIVE[chip].values()) <= {row["kernel"] for row in rows}
    assert all(row["chip"] == chip and row["fits"] for row in rows)
    assert any(row["wgmma"] for row in rows) == (chip == "sm_90")


def test_gpu_check_needs_torch_alone_and_says_when_there_is_no_gpu() -> None:
    heavy = "{'grpc', 'click', 'structlog', 'transformers', 'rich'}"
    code = f"import bench.gpu_check as c, sys; print({heavy} & set(sys.modules)); sys.argv[1:] = []; sys.exit(c.main())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines()[0] == "set()", run.stderr
    assert torch.cuda.is_available() or (run.returncode == 2 and "sees no GPU" in run.stderr)


def test_the_cpu_path_never_imports_triton() -> None:
    run = subprocess.run([sys.executable, "-c", CPU_PATH], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "False", run.stderr
