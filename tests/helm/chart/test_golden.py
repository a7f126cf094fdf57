"""Lint and render every example on both majors of Helm. GOLDEN=1 writes the golden files anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from chart_files import CHART, EXAMPLES, ROOT
from chart_tools import MAJORS, helm, rendered

GOLDEN = ROOT / "tests" / "helm" / "golden"
EVERY_EXAMPLE = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


@pytest.mark.parametrize("major", MAJORS)
@EVERY_EXAMPLE
def test_lint_is_strict(example: Path, major: str) -> None:
    done = helm(major, "lint", "--strict", CHART, "-f", example, "--kube-version", "1.33")
    assert done.returncode == 0, done.stdout + done.stderr


@EVERY_EXAMPLE
def test_both_majors_render_the_golden_file(example: Path) -> None:
    three, four = (rendered(example, major=major) for major in MAJORS)
    assert three == four
    golden = GOLDEN / f"{example.stem.removesuffix('-values')}.yaml"
    if os.environ.get("GOLDEN"):
        golden.write_text(three, "utf-8")
    assert three == golden.read_text("utf-8"), f"{golden.name} differs: look at it, then GOLDEN=1 make helm-test"


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {path.stem.removesuffix("-values") for path in EXAMPLES}
