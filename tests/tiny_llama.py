"""A tiny random Llama as a Hugging Face folder, written without transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 211, 64, 96, 2, 4, 2


def save_tiny_llama(
    folder: Path, *, layers: int = LAYERS, vocabulary: int = VOCABULARY, seed: int = 5, max_context: int = 256
) -> Path:
    """Writes config.json and model.safetensors into `folder`, which exists; returns it."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    head = WIDTH // HEADS
    tensors = {"model.embed_tokens.weight": weight(vocabulary, WIDTH), "model.norm.weight": 1 + weight(WIDTH)}
    for layer in range(layers):
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
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": max_context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
