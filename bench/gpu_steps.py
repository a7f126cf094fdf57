"""Whole steps of an 8B model, as `bench.gpu_check` runs them: each way in a process of its own, since the memory of two
would not fit, and each with a limit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from bench.gpu_report import Report

STEPS = ("-m", "bench.offline", "--device", "cuda", "--chunk-size", "16384", "--json")
SHORT = ("--model", "random:llama-3-8b", "--points", "tg1@1024,tg32@1024,tg64@1024,tg128@1024,tg256@1024,pp8x2048")
LONG = ("--model", "random:llama-3-8b-32k", "--points", "tg8@32768,tg32@8192", "--runs", "1")
LIMIT_S = 180.0
NEEDED_S = 60.0
"""With less time left a process is not started: it loads, captures and measures for about so long at least."""


@dataclass(frozen=True)
class Way:
    """A name and the arguments of the process."""

    name: str
    arguments: tuple[str, ...]


def ways(flashinfer: bool) -> list[Way]:
    """All, in order of worth: what comes last is skipped first."""
    by_triton = ("--attention", "triton")
    found = [
        Way("graphs", (*STEPS, *SHORT, "--graphs", *by_triton)),
        Way("graphs, long contexts", (*STEPS, *LONG, "--graphs", *by_triton)),
        Way("no graphs", (*STEPS, *SHORT, "--no-graphs", *by_triton)),
    ]
    if flashinfer:
        by_flashinfer = ("--graphs", "--attention", "flashinfer")
        found.insert(2, Way("graphs, FlashInfer", (*STEPS, *SHORT, *by_flashinfer)))
        found.append(Way("graphs, FlashInfer, long contexts", (*STEPS, *LONG, *by_flashinfer)))
    return found


def run_way(way: Way, report: Report, limit_s: float = LIMIT_S) -> bool:
    """Run one and report its rows; whether it ended well. What takes longer than `limit_s`, or than the report has
    left, is killed, and a row says so. One that can't be started for want of time is a row too, and no failure."""
    if report.skips(f"steps, {way.name}", NEEDED_S):
        return True
    limit = min(limit_s, report.left_s())
    command = [sys.executable, *way.arguments]
    try:
        done = subprocess.run(command, check=False, timeout=limit, stdout=subprocess.PIPE)
    except subprocess.TimeoutExpired as error:
        _relay(way, error.stdout or b"", report)
        report.say(steps=way.name, ok=False, failure=f"killed: it took longer than {limit:.0f} s")
        return False
    _relay(way, done.stdout, report)
    if done.returncode:
        report.say(steps=way.name, ok=False, failure=f"status {done.returncode}")
    return done.returncode == 0


def _relay(way: Way, output: bytes, report: Report) -> None:
    """Its rows, and what it was in the midst of writing left out."""
    for line in output.decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            report.say(**{"way": way.name, **row})
