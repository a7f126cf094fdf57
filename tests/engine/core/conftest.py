"""A tiny random Llama in a folder, engines over it, and each kernel implementation in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.config import EngineConfig
from engine.loading import Engine, load_engine
from kernels import dispatch

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 211, 64, 96, 2, 4, 2


@pytest.fixture(params=dispatch.NAMES)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on each implementation."""
    with dispatch.forced(request.param) as chosen:
        yield chosen.name


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread unless a test asks for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a random two-layer Llama."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    generator = torch.Generator().manual_seed(5)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    head = WIDTH // HEADS
    tensors = {"model.embed_tokens.weight": weight(VOCABULARY, WIDTH), "model.norm.weight": 1 + weight(WIDTH)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors[at + "self_attn.q_proj.weight"] = weight(WIDTH, WIDTH)
        tensors[at + "self_attn.k_proj.weight"] = weight(KV_HEADS * head, WIDTH)
        tensors[at + "self_attn.v_proj.weight"] = weight(KV_HEADS * head, WIDTH)
        tensors[at + "self_attn.o_proj.weight"] = weight(WIDTH, WIDTH)
        tensors[at + "mlp.gate_proj.weight"] = weight(INNER, WIDTH)
        tensors[at + "mlp.up_proj.weight"] = weight(INNER, WIDTH)
        tensors[at + "mlp.down_proj.weight"] = weight(WIDTH, INNER)
        tensors[at + "input_layernorm.weight"] = 1 + weight(WIDTH)
        tensors[at + "post_attention_layernorm.weight"] = 1 + weight(WIDTH)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def make_engine(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """`make_engine(num_blocks=32, block_size=4, buffer_factory=None, **settings)`."""
    kernels = dispatch.build.cache_dir()
    monkeypatch.setattr(dispatch.build, "cache_dir", lambda: kernels)  # no kernel is compiled again
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path))

    def make(num_blocks: int = 32, block_size: int = 4, buffer_factory: Any = None, **settings: Any) -> Engine:
        config = EngineConfig(model=str(tiny_model), num_blocks=num_blocks, block_size=block_size, **settings)
        return load_engine(config, buffer_factory)

    return make
