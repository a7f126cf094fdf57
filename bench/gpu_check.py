"""The GPU kernels on a real GPU: `PYTHONPATH=. python -m bench.gpu_check`, JSON lines.

Needs torch with a GPU and its triton, and nothing else: no installed package. First every kernel beside its reference
in bfloat16 and float16, then the main ones beside their floors, then whole steps of an 8B model with random weights.
Attention by FlashInfer and FlashAttention is taken beside Triton's where they are installed; a line says which are.
Ends with status 1 when one differs or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback

os.environ.pop("TRITON_INTERPRET", None)  # triton reads it when it is imported

import torch
import triton

from bench.gpu_attention import installed, remarks
from bench.gpu_parity import checks
from bench.gpu_speed import cases, measure_rates

DEVICE = "cuda"
POINTS = "tg1@1024,tg32@1024,tg64@1024,tg128@1024,tg256@1024,pp8x2048"
STEPS = ("--device", "cuda", "--model", "random:llama-3-8b", "--chunk-size", "16384", "--points", POINTS, "--json")
STEPS_SECONDS = 180


def main() -> int:
    """Run what the flags ask for; return the exit status."""
    parser = argparse.ArgumentParser(description="GPU kernels beside their references and floors; JSON lines.")
    parser.add_argument("--only", default="", help="names that have this in them")
    parser.add_argument("--skip-parity", action="store_true")
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--skip-steps", action="store_true")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no GPU; what runs without one is in tests/kernels/triton", file=sys.stderr)
        return 2
    _say(device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)
    for line in remarks():
        _say(**line)
    failed = 0 if given.skip_parity else _parity(given.only)
    failed += 0 if given.skip_speed else _speed(given.only)
    failed += 0 if given.skip_steps or given.only else _steps()
    _say(done=True, failed=failed)
    return 1 if failed else 0


def _parity(only: str) -> int:
    failed = 0
    for dtype in (torch.bfloat16, torch.float16):
        for check in checks(dtype, DEVICE):
            if only not in check.name:
                continue
            try:
                error = check.largest_error()
                good = error <= check.tolerance
                _say(check=check.name, dtype=str(dtype), error=error, tolerance=check.tolerance, ok=good)
            except Exception:
                good = False
                _say(check=check.name, dtype=str(dtype), ok=False, failure=traceback.format_exc()[-1500:])
            failed += not good
    return failed


def _speed(only: str) -> int:
    rates, failed = measure_rates(DEVICE), 0
    _say(copy_gb_per_s=round(rates.gb_per_s), product_tflops=round(rates.tflops))
    for case in cases(DEVICE):
        if only in case.name:
            try:
                _say(**case.measure(rates))
            except Exception:
                failed += 1
                _say(case=case.name, ok=False, failure=traceback.format_exc()[-1500:])
    return failed


def _steps() -> int:
    """Whole steps of Llama 3 8B, each way in a process of its own: the memory of both would not fit."""
    failed = 0
    torch.cuda.empty_cache()
    flashinfer = [["--graphs", "--attention", one.name] for one in installed() if one.name == "flashinfer"]
    for way in (["--graphs", "--attention", "triton"], ["--no-graphs", "--attention", "triton"], *flashinfer):
        command = [sys.executable, "-m", "bench.offline", *STEPS, *way]
        failed += subprocess.run(command, check=False, timeout=STEPS_SECONDS).returncode != 0
    return failed


def _say(**line: object) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
