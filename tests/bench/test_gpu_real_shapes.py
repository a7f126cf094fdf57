"""The checks on large models' shapes, on a model that Triton's interpreter has time for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench.gpu_real_shapes import MODELS, Model, model_checks

TINY = Model("tiny", 4, 1, 64, 128, 256, True, contexts=(1, 20, 40), queries=(1, 5, 9), rows=(3,))


def test_all_hold_on_a_tiny_model() -> None:
    found = list(model_checks(TINY, torch.float16, "cpu"))
    assert len({check.name for check in found}) == len(found)
    assert {check.name: check.largest_error() <= check.tolerance for check in found} == {c.name: True for c in found}


def test_the_models_are_those_of_their_papers() -> None:
    shapes = {model.name: (model.heads, model.kv_heads, model.width, model.inner) for model in MODELS}
    assert shapes["Llama 3 8B"] == (32, 8, 4096, 14336)
    assert shapes["Llama 3 70B, a rank of 8"] == (64 // 8, 8 // 8, 8192, 28672 // 8)
    assert shapes["Qwen3 8B"] == (32, 8, 4096, 12288)
    for model in MODELS:
        assert model.width % 128 == model.inner % 128 == 0
        assert len(model.contexts) == len(model.queries)
