"""The GPU kernels on a real GPU: `PYTHONPATH=. python -m bench.gpu_check`, JSON lines and a short table at the end.

Needs torch with a GPU and its triton, and nothing else: no installed package. First every kernel beside its reference
in bfloat16 and float16, on small odd shapes and on those of large models, then the main ones beside their floors, then
whole steps of an 8B model with random weights.
Attention by FlashInfer and FlashAttention is taken beside Triton's where they are installed; a line says which are.
The lines are written to a file too (`--json`; default: bench/results/gpu-check-TIME.jsonl); the first says what ran.
After `--limit-s` seconds nothing more is begun, and rows say what was skipped: all ends within 9 minutes.
Ends with status 1 when one differs or fails.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # triton reads it when it is imported

import torch
import triton

from bench.gpu_attention import installed, remarks
from bench.gpu_parity import Check, checks, parity
from bench.gpu_real_shapes import MODELS, model_checks
from bench.gpu_report import LIMIT_S, Report, table
from bench.gpu_speed import cases, measure_rates
from bench.gpu_steps import run_way, ways

DEVICE = "cuda"
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run what the flags ask for; return the exit status."""
    parser = argparse.ArgumentParser(description="GPU kernels beside their references and floors; JSON lines.")
    parser.add_argument("--only", default="", help="names that have this in them")
    parser.add_argument("--skip-parity", action="store_true")
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--skip-steps", action="store_true")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="nothing is begun later (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, help="where the lines go too (default: bench/results/gpu-check-TIME.jsonl)"
    )
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no GPU; what runs without one is in tests/kernels/triton", file=sys.stderr)
        return 2
    path = given.json or RESULTS / f"gpu-check-{time.strftime('%Y-%m-%d-%H%M%S')}.jsonl"
    with Report(path, given.limit_s) as report:
        failed = _all(given, report)
    print(f"\n{table(report.rows)}\nThe lines are in {path}.")
    return 1 if failed else 0


def _all(given: argparse.Namespace, report: Report) -> int:
    """How many failed."""
    report.say(
        date=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        command=shlex.join([Path(sys.executable).name, "-m", "bench.gpu_check", *sys.argv[1:]]),
    )
    for line in remarks():
        report.say(**line)
    failed = 0 if given.skip_parity else parity(_checks(given.only), report)
    failed += 0 if given.skip_speed else _speed(given.only, report)
    failed += 0 if given.skip_steps or given.only else _steps(report)
    report.say(done=True, failed=failed, skipped=report.skipped)
    return failed


def _checks(only: str) -> Iterator[tuple[torch.dtype, Check]]:
    for dtype in (torch.bfloat16, torch.float16):
        real = (model_checks(model, dtype, DEVICE) for model in MODELS)
        for check in chain(checks(dtype, DEVICE), *real):
            if only in check.name:
                yield dtype, check


def _speed(only: str, report: Report) -> int:
    if report.skips("kernels beside their floors"):
        return 0
    rates, failed = measure_rates(DEVICE), 0
    report.say(copy_gb_per_s=round(rates.gb_per_s), product_tflops=round(rates.tflops))
    for case in cases(DEVICE):
        if only not in case.name:
            continue
        if report.skips(f"kernels from {case.name} on"):
            break
        try:
            report.say(**case.measure(rates))
        except Exception:
            failed += 1
            report.say(case=case.name, ok=False, failure=traceback.format_exc()[-1500:])
    return failed


def _steps(report: Report) -> int:
    torch.cuda.empty_cache()
    flashinfer = any(one.name == "flashinfer" for one in installed())
    return sum(not run_way(way, report) for way in ways(flashinfer))


if __name__ == "__main__":
    sys.exit(main())
