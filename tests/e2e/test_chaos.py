"""Everything breaks for a while, and no stream notices: `make chaos` in short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(280)
def test_streams_outlive_kills_hangs_drains_and_broken_links() -> None:
    """Two of each, a fault whenever each role has a worker: every stream says what it says undisturbed, nothing is
    held afterwards, and everything stops in order.
    """
    command = [sys.executable, "tests/chaos", "--minutes", "0.15", "--seed", "20", "--streams", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=270)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout.splitlines()[-1])
    assert verdict["ok"] is True
    assert verdict["streams"] >= 8
    assert sum(verdict["faults"].values()) >= 3
