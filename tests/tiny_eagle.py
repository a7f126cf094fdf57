"""Random EAGLE heads for `tiny_llama`, in the published format, and what they say, by plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_llama import HEADS, INNER, KV_HEADS, VOCABULARY, WIDTH
from torch.nn.functional import linear, scaled_dot_product_attention, silu

EPS = 1e-5
DIM = WIDTH // HEADS


def save_tiny_eagle(
    folder: Path,
    version: int,
    *,
    width: int = WIDTH,
    taps: list[int] | None = None,
    draft_vocabulary: int = 100,
    bias: bool = False,
    seed: int = 1,
    **config: Any,
) -> Path:
    """Writes a head into `folder`, which exists; returns it. EAGLE-1 has neither `taps` nor a vocabulary of its own."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    at, inputs = ("midlayer", 2 * width) if version == 3 else ("layers.0", width)
    tensors = {
        "fc.weight": weight(width, 3 * WIDTH if version == 3 else 2 * width),
        f"{at}.self_attn.q_proj.weight": weight(HEADS * DIM, inputs),
        f"{at}.self_attn.k_proj.weight": weight(KV_HEADS * DIM, inputs),
        f"{at}.self_attn.v_proj.weight": weight(KV_HEADS * DIM, inputs),
        f"{at}.self_attn.o_proj.weight": weight(width, HEADS * DIM),
        f"{at}.mlp.gate_proj.weight": weight(INNER, width),
        f"{at}.mlp.up_proj.weight": weight(INNER, width),
        f"{at}.mlp.down_proj.weight": weight(width, INNER),
        f"{at}.post_attention_layernorm.weight": 1 + weight(width),
    }
    if bias:
        tensors["fc.bias"] = weight(width)
    if version == 1 or width != WIDTH:
        tensors["embed_tokens.weight"] = weight(VOCABULARY, width)
    if version == 3:
        ids = torch.randperm(VOCABULARY, generator=generator)[:draft_vocabulary].sort().values
        tensors |= {
            f"{at}.hidden_norm.weight": 1 + weight(width),
            f"{at}.input_layernorm.weight": 1 + weight(width),
            "norm.weight": 1 + weight(width),
            "lm_head.weight": weight(draft_vocabulary, width),
            "d2t": ids - torch.arange(draft_vocabulary),
            "t2d": torch.zeros(VOCABULARY, dtype=torch.bool).index_fill_(0, ids, True),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLMEagle3" if version == 3 else "LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "head_dim": DIM,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 64,
        "rms_norm_eps": EPS,
        **({"draft_vocab_size": draft_vocabulary} if version == 3 else {}),
        **({"target_hidden_size": WIDTH} if width != WIDTH else {}),
        **({"eagle_config": {"eagle_aux_hidden_state_layer_ids": taps}} if taps else {}),
        **config,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


class ReferenceHead:
    """What a head says, computed anew for each question, by the definition."""

    def __init__(self, folder: Path, target: Path) -> None:
        self.w = load_file(folder / "model.safetensors")
        self.config = json.loads((folder / "config.json").read_text())
        self.third = "norm.weight" in self.w
        self.at = "midlayer" if self.third else "layers.0"
        self.table = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
        self.embedding = self.table if self.config["hidden_size"] == WIDTH else self.w["embed_tokens.weight"]

    def draft(self, tokens: list[int], features: torch.Tensor, count: int) -> list[int]:
        """The likeliest `count` tokens after `tokens`; `features` [len(tokens) - 1, F] of all but the last."""
        ids = tokens[1:]
        hidden = linear(features, self.w["fc.weight"], self.w.get("fc.bias")) if self.third else features
        found: list[int] = []
        for _ in range(count):
            out = self._layer(torch.tensor(ids), hidden)
            found.append(self._token(out[-1]))
            ids, hidden = [*ids, found[-1]], torch.cat([hidden, out[-1:]])
        return found

    def _layer(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding[ids]
        if self.third:
            normed = self._norm(hidden, f"{self.at}.hidden_norm")
            residual = normed if self.config.get("norm_before_residual") else hidden
            x = torch.cat([self._norm(embedded, f"{self.at}.input_layernorm"), normed], 1)
        else:
            residual = x = linear(torch.cat([embedded, hidden], 1), self.w["fc.weight"], self.w.get("fc.bias"))
        h = residual + self._attention(x)
        x = self._norm(h, f"{self.at}.post_attention_layernorm")
        mlp = f"{self.at}.mlp"
        gated = silu(linear(x, self.w[f"{mlp}.gate_proj.weight"])) * linear(x, self.w[f"{mlp}.up_proj.weight"])
        return h + linear(gated, self.w[f"{mlp}.down_proj.weight"])

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        at = f"{self.at}.self_attn"
        q, k, v = (
            linear(x, self.w[f"{at}.{part}_proj.weight"]).view(len(x), -1, DIM).transpose(0, 1) for part in "qkv"
        )
        angles = torch.arange(len(x))[:, None] / 10000.0 ** (torch.arange(0, DIM, 2) / DIM)
        cos, sin = (torch.cat([part, part], 1) for part in (angles.cos(), angles.sin()))
        q, k = (one * cos + torch.cat([-one[..., DIM // 2 :], one[..., : DIM // 2]], -1) * sin for one in (q, k))
        k, v = (one.repeat_interleave(HEADS // KV_HEADS, 0) for one in (k, v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(len(x), -1)
        return linear(mixed, self.w[f"{at}.o_proj.weight"])

    def _token(self, row: torch.Tensor) -> int:
        if not self.third:
            return int(linear(row, self.table).argmax())
        best = int(linear(self._norm(row, "norm"), self.w["lm_head.weight"]).argmax())
        return best + int(self.w["d2t"][best])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * self.w[f"{name}.weight"]
