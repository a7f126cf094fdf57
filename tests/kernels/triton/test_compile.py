"""GPU kernels compile for chips that are not here without spilling; the CPU path never meets triton."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernels.triton import variants
from kernels.triton.launch import Target, compiling_for
from kernels.triton.variants import VARIANTS

CPU_PATH = "import engine.runner, decode_service.wiring, prefill_service.wiring, sys; print('triton' in sys.modules)"


@pytest.mark.timeout(280)
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "gfx942"])
def test_every_kernel_compiles_and_fits(chip: str) -> None:
    """All variants, without a spill: about 20 s of one core a chip where triton's cache is empty."""
    command = [sys.executable, "-m", "bench.gpu_table", "--chip", chip]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["variant"] for row in rows} == set(VARIANTS)
    assert all(row["chip"] == chip and row["spilled"] == 0 and row["fits"] for row in rows)
    by_tensor_cores = {row["kernel"] for row in rows if row["wgmma"]}
    assert by_tensor_cores >= ({"_prefill", "_scaled_linear"} if chip == "sm_90" else set())
    assert chip == "sm_90" or not by_tensor_cores


def test_every_kernel_has_a_variant() -> None:
    """Kernels are triton's functions that no other calls."""
    source = "\n".join(path.read_text() for path in Path(variants.__file__).parent.glob("*.py"))
    defined = set(re.findall(r"@triton\.jit\ndef (\w+)", source))
    launched = {name for name in defined if not re.search(rf"(?<!def )\b{name}\(", source)}
    with compiling_for(Target("cuda", 90)):
        compiled = {launch.kernel.__name__ for make in VARIANTS.values() for launch in make()}
    assert compiled == launched


def test_gpu_check_needs_torch_alone_and_says_when_there_is_no_gpu() -> None:
    heavy = "{'grpc', 'click', 'structlog', 'transformers', 'rich'}"
    code = f"import bench.gpu_check as c, sys; print({heavy} & set(sys.modules)); sys.argv[1:] = []; sys.exit(c.main())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines()[0] == "set()", run.stderr
    assert torch.cuda.is_available() or (run.returncode == 2 and "sees no GPU" in run.stderr)


def test_the_cpu_path_never_imports_triton() -> None:
    run = subprocess.run([sys.executable, "-c", CPU_PATH], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "False", run.stderr
