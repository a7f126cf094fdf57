"""Logits of tiny random models, and of the default model, against transformers in float32."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import dispatch

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
YARN_MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-rope-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-rope-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-rope-yarn-mscale": ("llama", {"rope_parameters": YARN_MSCALE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 16, "head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-window-tied": (
        "qwen3",
        {"head_dim": 32, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
        | {"tie_word_embeddings": True, "attention_bias": True},
    ),
}


def _prompt(length: int, vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, vocabulary, (length,), generator=generator).tolist()


@pytest.mark.parametrize("case", CASES)
def test_tiny_models_match_transformers(
    case: str, save_tiny: Callable[..., Any], make_driver: Callable[..., Any]
) -> None:
    """All logits of 100 positions, fed in uneven chunks, within 1e-4."""
    kind, overrides = CASES[case]
    folder, reference = save_tiny(kind, **overrides)
    prompt = _prompt(100, 211)
    (logits,) = make_driver(folder).run([prompt], chunk=37)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def _random_config(kind: str, number: int) -> dict[str, Any]:
    """Everything that a config.json may say of `kind`, drawn; widths that don't divide anything in the kernels."""
    draw = random.Random(f"{kind} {number}")
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 4])
    theta = draw.choice([500.0, 1e4, 1e6])
    original = draw.choice([16, 40, 64])
    scaled = {"rope_theta": theta, "factor": draw.choice([1.5, 4.0, 8.0]), "original_max_position_embeddings": original}
    linear = {"rope_type": "linear", "rope_theta": theta, "factor": 3.0}
    bands = {"low_freq_factor": draw.choice([1.0, 2.0]), "high_freq_factor": draw.choice([4.0, 8.0])}
    ropes = [
        {"rope_type": "default", "rope_theta": theta},
        linear,
        {"rope_type": "llama3", **scaled, **bands},
        {"rope_type": "yarn", **scaled, "attention_factor": draw.choice([None, 1.25])},
    ]
    config: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * draw.choice([8, 16, 24]),
        "intermediate_size": draw.choice([40, 88, 131]),
        "num_hidden_layers": draw.choice([1, 2, 4]),
        "vocab_size": draw.choice([67, 128, 211]),
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_parameters": ropes[number % len(ropes)],
        "initializer_range": 0.1,
    }
    if kind == "qwen3" or draw.random() < 0.5:
        config["head_dim"] = draw.choice([8, 24, 40])
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = draw.random() < 0.5
    if kind == "llama":
        config["mlp_bias"] = draw.random() < 0.5
    if kind == "mistral":
        config["sliding_window"] = draw.choice([None, 5, 33])
    if kind in ("qwen2", "qwen3"):
        types = [draw.choice(["full_attention", "sliding_attention"]) for _ in range(config["num_hidden_layers"])]
        config |= {"use_sliding_window": draw.random() < 0.7, "sliding_window": draw.choice([7, 30])}
        config |= {"max_window_layers": draw.choice([0, 1, 3])}
        if config["use_sliding_window"] and draw.random() < 0.5:
            config["layer_types"] = types
    return config


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_random_configs_match_transformers(
    kind: str, save_tiny: Callable[..., Any], make_driver: Callable[..., Any]
) -> None:
    """Eight drawn shapes of each architecture, two for each RoPE scaling: all logits within 1e-4."""
    for number in range(8):
        overrides = _random_config(kind, number)
        folder, reference = save_tiny(kind, **overrides)
        prompt = _prompt(70, overrides["vocab_size"])
        (logits,) = make_driver(folder, block_size=8).run([prompt], chunk=29)
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).logits[0]
        assert expected.std() > 0.05, overrides
        error = (logits - expected).abs().max()
        assert error < 1e-4, (float(error), overrides)


def test_a_tied_model_with_another_head(save_tiny: Callable[..., Any], make_driver: Callable[..., Any]) -> None:
    """The file's own head is used, by transformers and by us."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    folder, _ = save_tiny("llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    prompt = _prompt(30, 211)
    (logits,) = make_driver(folder).run([prompt], chunk=30)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR, YARN], ids=lambda rope: str(rope["rope_type"]))
def test_old_spellings_mean_the_same(
    rope: dict[str, Any], save_tiny: Callable[..., Any], make_driver: Callable[..., Any]
) -> None:
    """A config.json as transformers 4 wrote it, read by transformers and by us: the same logits from the same file."""
    from transformers import AutoModelForCausalLM

    folder, _ = save_tiny("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_parameters", "layer_types", "dtype", "head_dim"):
        config.pop(key, None)
    settings = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    config |= {"rope_theta": 5000.0, "rope_scaling": {"type": rope["rope_type"], **settings}, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    prompt = _prompt(60, 211)
    (logits,) = make_driver(folder).run([prompt], chunk=25)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["llama-tied", "qwen3"])
def test_torch_kernels(case: str, save_tiny: Callable[..., Any], make_driver: Callable[..., Any]) -> None:
    """The same without a compiler, through the reference kernels."""
    kind, overrides = CASES[case]
    folder, reference = save_tiny(kind, **overrides)
    prompt = _prompt(40, 211)
    with dispatch.forced("torch"):
        (logits,) = make_driver(folder).run([prompt], chunk=16)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_shards_load(save_tiny: Callable[..., Any], make_driver: Callable[..., Any]) -> None:
    """A folder of several files gives the bits of a single one."""
    prompt = _prompt(20, 211)
    single, _ = save_tiny("llama")
    expected = make_driver(single).run([prompt], chunk=20)[0]
    (single / "model.safetensors").unlink()
    sharded, _ = save_tiny("llama", max_shard_size="100KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert torch.equal(make_driver(sharded).run([prompt], chunk=20)[0], expected)


def test_windows_and_scalings_matter(save_tiny: Callable[..., Any], make_driver: Callable[..., Any]) -> None:
    """The parity test would notice a window or a scaling that is ignored."""
    prompt = _prompt(100, 211)
    plain_folder, _ = save_tiny("mistral", sliding_window=None)
    plain = make_driver(plain_folder).run([prompt], chunk=100)[0]
    for overrides in ({"sliding_window": 16}, {"sliding_window": None, "rope_parameters": YARN}):
        folder, _ = save_tiny("mistral", **overrides)
        changed = make_driver(folder).run([prompt], chunk=100)[0]
        assert (changed[-1] - plain[-1]).abs().max() > 1e-2


def test_bfloat16_weights(save_tiny: Callable[..., Any], make_driver: Callable[..., Any]) -> None:
    """`dtype` bfloat16 rounds the weights only; compute bf16 rounds activations too and stays near."""
    folder, reference = save_tiny("llama")
    prompt = _prompt(60, 211)
    rounded = make_driver(folder, dtype="bfloat16").run([prompt], chunk=60)[0]
    fast = make_driver(folder, dtype="bfloat16", compute="bf16", kv_dtype="bfloat16").run([prompt], chunk=60)[0]
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "norm" not in name:
                parameter.copy_(parameter.bfloat16().float())
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(rounded, expected, atol=1e-4, rtol=0)
    error = (fast - expected).abs().max() / expected.std()
    assert 1e-4 < error < 0.3


def test_a_bfloat16_checkpoint_keeps_its_bits(save_tiny: Callable[..., Any], make_driver: Callable[..., Any]) -> None:
    """Packed as bfloat16 (half the memory) with dtype float32: the same bits as the same values packed as float32."""
    folder, reference = save_tiny("qwen2")
    reference.bfloat16().save_pretrained(folder / "bf16")
    reference.float().save_pretrained(folder / "f32")
    prompt = _prompt(40, 211)
    half, full = make_driver(folder / "bf16"), make_driver(folder / "f32")
    assert half.model.head.packed.dtype is torch.bfloat16
    assert full.model.head.packed.dtype is torch.float32
    assert torch.equal(half.run([prompt], chunk=40)[0], full.run([prompt], chunk=40)[0])


@pytest.fixture(scope="module")
def transformers_default(default_model_path: Path) -> Any:
    """The default model in transformers, float32, dequantised by transformers' own reader.

    The reader parses the vocabulary for the config and again for the weights, and makes the map of names for each
    tensor: remembered meanwhile, which halves the time.
    """
    import gguf
    from transformers import AutoModelForCausalLM, GgufConfig

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        return AutoModelForCausalLM.from_pretrained(
            default_model_path.parent,
            gguf_file=default_model_path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        ).eval()


def test_default_model_matches_transformers(default_driver: Any, transformers_default: Any) -> None:
    """Every position's logits of a real prompt; greedy tokens equal where the reference's top two are 1e-4 apart."""
    # "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    turn = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    prompt = turn + _prompt(48, 49152)
    (logits,) = default_driver.run([prompt], chunk=64)
    with torch.inference_mode():
        expected = transformers_default(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=0)
    top = expected.topk(2, dim=-1)
    clear = top.values[:, 0] - top.values[:, 1] >= 1e-4
    assert clear.sum() > 32
    assert torch.equal(logits.argmax(-1)[clear], top.indices[clear, 0])
