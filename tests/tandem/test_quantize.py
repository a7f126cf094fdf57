"""`tandem quantize` and what `tandem models show` says of the result, as processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def tandem(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tandem", *words], capture_output=True, text=True, timeout=120)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of one layer."""
    random = np.random.default_rng(1)
    tensors = {f"model.layers.0.{name}.weight": random.normal(size=shape) for name, shape in SHAPES.items()}
    tensors |= {f"model.layers.0.{name}_layernorm.weight": np.ones(32) for name in ("input", "post_attention")}
    tensors |= {"model.norm.weight": np.ones(32), "model.embed_tokens.weight": random.normal(size=(11, 32))}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def test_a_quantised_copy_is_made_and_shown(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = tandem("quantize", "--format", "int4", str(model), str(out))
    assert (done.returncode, done.stdout) == (0, f"{out}: serve it with --model {out}\n")
    assert "11 of 11 tensors" in done.stderr
    again = tandem("quantize", "--format", "int4", str(model), str(out))
    assert again.returncode == 2
    assert "is there already" in again.stderr
    shown = json.loads(tandem("models", "show", "--json", str(out)).stdout)
    assert shown["quantised layers"] == {"int4, groups of 32": 7}
    assert shown["parameters"] == 11 * 32 + 3 * 32 + sum(rows * inputs for rows, inputs in SHAPES.values())
    assert shown["bytes"] == (out / "model.safetensors").stat().st_size
    assert shown["kernels"].startswith(("int8 (", "exact ("))


def test_a_broken_one_is_said_to_be(model: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "hqq"}}
    (model / "config.json").write_text(json.dumps(config))
    done = tandem("models", "show", str(model))
    assert done.returncode == 2
    assert "quant_method: 'hqq' is not supported; known: gptq" in done.stderr


def test_formats_that_calibrate_need_a_text(model: Path, tmp_path: Path) -> None:
    words = ("quantize", str(model), str(tmp_path / "out"), "--format")
    without, beside = tandem(*words, "gptq"), tandem(*words, "int4", "--text", str(model / "config.json"))
    assert (without.returncode, beside.returncode) == (2, 2)
    assert "--format gptq needs --text" in without.stderr
    assert "--format int4 calibrates on nothing" in beside.stderr
