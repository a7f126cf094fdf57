"""`scripts/setup` with a Python that only pretends: no package is brought."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PYTHON = """#!/usr/bin/env bash
# Notes how it is called. `-m venv` copies it to .venv, with pip; `pip install` waits for the file `go`.
cd "$HOUSE"
echo "$*" >>calls
case "$*" in
    "-c import sys, pip;"*) [ -e .venv/pip ] ;;
    "-m venv"*)
        mkdir -p .venv/bin
        touch .venv/pip
        cp "$0" .venv/bin/python
        printf '#!/bin/sh\\n' >.venv/bin/tandem
        chmod +x .venv/bin/tandem ;;
    "-c import importlib"*) [ -e .venv/nixl ] ;;
    "-m pip install --no-deps nixl"*) touch .venv/nixl ;;
    *"--dry-run"*) echo "Would install torch-2.13.0" ;;
    "-m pip install"*)
        [ -e .venv/pip ] || { echo "No module named pip" >&2; exit 1; }
        echo "Collecting something large"
        until [ -e go ]; do sleep 0.05; done
        echo "Requirement already satisfied: click"
        echo "Successfully installed" ;;
esac
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder with scripts/setup, what it reads, and the pretender as `python`."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup", tmp_path / "scripts")
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def _setup(house: Path, **changes: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHON": str(house / "python"), "HOUSE": str(house)}
    for name in ("TORCH_INDEX_URL", "NIXL"):
        environment.pop(name, None)
    environment |= changes
    with (house / "output").open("wb") as output:
        return subprocess.Popen(
            [house / "scripts/setup"], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


def test_progress_is_seen_while_it_is_made(house: Path) -> None:
    """A download of minutes must not look like a hang; the second time there is nothing to do."""
    process = _setup(house)
    try:
        _until(lambda: "Collecting something large" in (house / "output").read_text())
    finally:
        (house / "go").touch()
        assert process.wait(30) == 0
    output = (house / "output").read_text()
    assert "Successfully installed" in output
    assert "already satisfied" not in output
    assert output.splitlines()[-1] == "==> ready"
    assert _setup(house).wait(30) == 0
    assert (house / "output").read_text() == ""


def test_half_a_venv_is_made_anew(house: Path) -> None:
    """What an interrupted or failed `python -m venv` leaves: a Python without pip."""
    (house / "go").touch()
    (house / ".venv/bin").mkdir(parents=True)
    shutil.copy(house / "python", house / ".venv/bin")
    assert _setup(house).wait(30) == 0, (house / "output").read_text()
    assert any(call.startswith("-m venv") for call in (house / "calls").read_text().splitlines())


def test_nixl_is_brought_alone_and_only_when_asked_for(house: Path) -> None:
    """With its dependencies it would bring CUDA packages."""
    (house / "go").touch()

    def installs() -> list[str]:
        return [call for call in (house / "calls").read_text().splitlines() if "nixl" in call and "pip install" in call]

    assert _setup(house).wait(30) == 0
    assert installs() == []
    for _ in range(2):
        assert _setup(house, NIXL="1").wait(30) == 0
        assert len(installs()) == 1
    assert installs()[0].startswith("-m pip install --no-deps nixl-cu12==")
