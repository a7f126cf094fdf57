"""Attention of other packages in the GPU checks, with fakes in their places and a CPU in a GPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attention_packages import FAKES, install

pytest.importorskip("triton")

from bench.gpu_attention import by, others, remarks
from bench.gpu_inputs import make_step
from kernels import flashinfer_attention

F16 = torch.float16


@pytest.mark.parametrize(("window", "cap"), [(None, None), (20, None), (None, 20.0)])
def test_steps_by_other_packages_are_what_is_expected(
    window: int | None, cap: float | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(flashinfer_attention, "WORKSPACE_BYTES", 1024)
    for name in FAKES:
        install(monkeypatch, tmp_path, name)
    contexts = [1, 17, 90]
    for counts in ([1, 1, 1], [1, 15, 40]):
        step = make_step(counts, contexts, F16, "cpu", heads=4, kv_heads=2, dim=64, window=window, cap=cap)
        taken = others(step)
        assert [candidate.name for candidate in taken] == ["flashinfer", "flash-attn-3"]  # blocks of 16
        for candidate in taken:
            run = by(candidate, step)
            assert torch.allclose(run().float(), step.expected(), atol=2e-3)
            assert torch.equal(run(), run())
    assert others(make_step([1], [5], F16, "cpu", form="int8")) == []


def test_a_line_says_what_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "flashinfer")
    install(monkeypatch, tmp_path, "flash-attn-2", "1.0")
    lines = {str(line["attention"]): str(line["beside_triton"]) for line in remarks()}
    assert lines["flashinfer"] == "yes"
    assert lines["flash-attn-3"] == "not installed"
    assert "flash-attn 1.0 is installed" in lines["flash-attn-2"]
