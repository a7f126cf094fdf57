"""Tiny quantised models, packed here bit by bit from what the formats say, beside the same weights as plain float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, Tensor]


@dataclass
class Coded:
    """Codes of one weight [N, K], float32 scales and integer zeros [N, G], and which group each input is of."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    groups: np.ndarray

    def weight(self) -> Tensor:
        """What the codes stand for."""
        scales, zeros = self.scales[:, self.groups], self.zeros[:, self.groups]
        return torch.from_numpy(((self.codes - zeros).astype(np.float32) * scales).astype(np.float32))


@dataclass
class Format:
    """A way to store weights: the configuration, and the tensors of one weight."""

    name: str
    config: Mapping[str, Any]
    write: Callable[[Format, Coded], Tensors]
    bits: int = 4
    group: int | None = 32
    symmetric: bool = False
    ordered: bool = False
    excluded: Sequence[str] = field(default_factory=tuple)


def stream(rows: np.ndarray, bits: int) -> Tensor:
    """Rows of codes as little-endian bit streams of 32-bit words: int32 [R, W]."""
    words = -(-rows.shape[1] * bits // 32)
    packed = []
    for row in rows:
        value = sum(int(code) << (bits * place) for place, code in enumerate(row))
        packed.append(np.frombuffer(value.to_bytes(words * 4, "little"), dtype=np.int32))
    return torch.from_numpy(np.stack(packed))


def awq(rows: np.ndarray) -> Tensor:
    """Rows of codes as AWQ packs eight columns into a word."""
    return stream(rows.reshape(len(rows), -1, 8)[:, :, AWQ_ORDER].reshape(len(rows), -1), 4)


def gptq(form: Format, coded: Coded) -> Tensors:
    first = form.config.get("checkpoint_format") == "gptq" or form.config.get("packing_format", "").endswith(
        "auto_gptq"
    )
    tensors = {
        "qweight": stream(coded.codes, form.bits).T,
        "qzeros": stream(coded.zeros.T - first, form.bits),
        "scales": torch.from_numpy(coded.scales.T).half(),
    }
    return tensors | ({"g_idx": torch.from_numpy(coded.groups).int()} if form.ordered else {})


def awq_gemm(form: Format, coded: Coded) -> Tensors:
    scales = torch.from_numpy(coded.scales.T).half()
    return {"qweight": awq(coded.codes.T), "qzeros": awq(coded.zeros.T), "scales": scales}


def awq_gemv(form: Format, coded: Coded) -> Tensors:
    rows, groups = coded.zeros.shape
    words = -(-groups // 32) * 4  # groups of 32: the words of a row come by fours
    zeros, scales = np.zeros((rows, words * 8), int), np.zeros((rows, words * 8), np.float32)
    zeros[:, :groups], scales[:, :groups] = coded.zeros, coded.scales
    return {
        "qweight": stream(coded.codes, 4),
        "qzeros": stream(zeros, 4),
        "scales": torch.from_numpy(scales).half(),
    }


def packed(form: Format, coded: Coded) -> Tensors:
    tensors = {
        "weight_packed": stream(coded.codes, form.bits),
        "weight_scale": torch.from_numpy(coded.scales).bfloat16(),
        "weight_shape": torch.tensor(coded.codes.shape),
    }
    zeros = {} if form.symmetric else {"weight_zero_point": stream(coded.zeros.T, form.bits).T}
    return tensors | zeros | _weight_order(form, coded)


def whole_int8(form: Format, coded: Coded) -> Tensors:
    tensors = {
        "weight": torch.from_numpy((coded.codes - 128).astype(np.int8)),
        "weight_scale": torch.from_numpy(coded.scales).bfloat16(),
    }
    return tensors | _weight_order(form, coded)


def torchao(form: Format, coded: Coded) -> Tensors:
    return {
        "_weight_qdata": torch.from_numpy((coded.codes - 128).astype(np.int8)),
        "_weight_scale": torch.from_numpy(coded.scales),
        "_weight_zero_point": torch.from_numpy((coded.zeros - 128).astype(np.int8)),
    }


def ao(kind: str, **data: Any) -> dict[str, Any]:
    """torchao's configuration."""
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 2, "_data": data}}}


def grain(kind: str, **sizes: Any) -> dict[str, Any]:
    """Who shares a scale, in torchao's words."""
    return {"_type": kind, "_version": 1, "_data": sizes}


def rows_of_127(form: Format, coded: Coded) -> Tensors:
    """As bitsandbytes: the largest magnitude of a row in place of its scale."""
    codes = torch.from_numpy((coded.codes - 128).astype(np.int8))
    return {
        "weight": codes,
        "SCB": torch.from_numpy(coded.scales[:, 0] * 127),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _weight_order(form: Format, coded: Coded) -> Tensors:
    return {"weight_g_idx": torch.from_numpy(coded.groups).int()} if form.ordered else {}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    settings = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    group = {"targets": ["Linear"], "weights": settings}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return config | {"ignore": ["lm_head"], "quantization_status": "compressed"}


def _gptq(name: str, bits: int = 4, group: int = 32, **config: Any) -> Format:
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": "gptq", "sym": False}
    settings |= config
    ordered = bool(settings.get("desc_act"))
    return Format(name, settings, gptq, bits, None if group == -1 else group, bool(settings["sym"]), ordered)


def _rounds(packing: str, write: Callable[[Format, Coded], Tensors], **config: Any) -> Format:
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "packing_format": packing}
    return Format(packing, settings | config, write)


FORMATS = {
    form.name: form
    for form in (
        _gptq("gptq"),
        _gptq("gptq-2", bits=2),
        _gptq("gptq-3", bits=3, group=64),
        _gptq("gptq-8", bits=8),
        _gptq("gptq-8-symmetric", bits=8, sym=True),
        _gptq("gptq-row", group=-1),
        _gptq("gptq-symmetric", sym=True),
        _gptq("gptq-ordered", desc_act=True),
        _gptq("gptq-v2", checkpoint_format="gptq_v2"),
        _gptq("gptq-v2-3-ordered", bits=3, checkpoint_format="gptq_v2", desc_act=True),
        _gptq("gptq-some", dynamic={"-:.*down_proj": {}}),
        Format("awq-gemm", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq_gemm),
        Format("awq-gemv", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, awq_gemv),
        _rounds("auto_round", gptq),
        _rounds("auto_round:auto_gptq", gptq),
        _rounds("auto_round:auto_awq", awq_gemm),
        Format("packed-symmetric", compressed("pack-quantized"), packed, symmetric=True),
        Format("packed-zeros", compressed("pack-quantized", symmetric=False), packed),
        Format("packed-ordered", compressed("pack-quantized", symmetric=False, actorder="group"), packed, ordered=True),
        Format("packed-3", compressed("pack-quantized", num_bits=3), packed, bits=3, symmetric=True),
        Format(
            "packed-8-row",
            compressed("pack-quantized", num_bits=8, strategy="channel", group_size=None),
            packed,
            bits=8,
            group=None,
            symmetric=True,
        ),
        Format(
            "int8-ordered",
            compressed("int-quantized", num_bits=8, actorder="group"),
            whole_int8,
            bits=8,
            symmetric=True,
            ordered=True,
        ),
        Format(
            "torchao-8",
            ao("Int8WeightOnlyConfig", granularity=grain("PerRow", dim=-1), set_inductor_config=True),
            torchao,
            bits=8,
            group=None,
            symmetric=True,
        ),
        Format(
            "torchao-groups", ao("IntxWeightOnlyConfig", granularity=grain("PerGroup", group_size=32)), torchao, bits=8
        ),
        Format(
            "bitsandbytes-8",
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
            rows_of_127,
            bits=8,
            group=None,
            symmetric=True,
        ),
        Format(
            "int8-row",
            compressed("int-quantized", num_bits=8, strategy="channel", group_size=None),
            whole_int8,
            bits=8,
            group=None,
            symmetric=True,
        ),
    )
}
FORMATS["gptq-some"].excluded = ["mlp.down_proj"]


def random_codes(form: Format, rows: int, inputs: int, random: np.random.Generator) -> Coded:
    """Any codes; zeros from 1 on, as the first convention of GPTQ can't store 0."""
    group = form.group or inputs
    groups, top = inputs // group, 1 << form.bits
    # Weights of one size whatever the bits: with larger ones a random model makes much of every rounding.
    scales = ((random.random((rows, groups)) * 0.3 + 0.1) / max(top, 16)).astype(np.float32)
    # Exact in bfloat16, and so in every type that a format stores scales in.
    scales = torch.from_numpy(scales).bfloat16().float().numpy()
    shape = (rows, groups)
    zeros = np.full(shape, top // 2) if form.symmetric else random.integers(1, top, shape)
    order = np.arange(inputs) // group
    return Coded(
        random.integers(0, top, (rows, inputs)), scales, zeros, random.permutation(order) if form.ordered else order
    )


def plain_tensors(random: np.random.Generator) -> Tensors:
    """Everything that isn't a linear layer's weight."""

    def normal(*shape: int, around: float = 0.0) -> Tensor:
        return torch.from_numpy(random.normal(around, 0.1, shape).astype(np.float32))

    tensors = {"model.embed_tokens.weight": normal(97, 64), "lm_head.weight": normal(97, 64)}
    norms = ["model.norm", *(f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention"))]
    return tensors | {f"{name}.weight": normal(64, around=1.0) for name in norms}


def biased(tensors: Tensors) -> Tensors:
    """With the biases that Qwen2 has on q, k and v."""
    random = np.random.default_rng(3)
    rows = {name: shape[0] for name, shape in SHAPES.items() if name[-6] in "qkv"}
    names = [f"model.layers.{layer}.{name}.bias" for layer in (0, 1) for name in rows]
    made = [random.normal(0, 0.5, rows[name.split(".", 3)[3].removesuffix(".bias")]) for name in names]
    return tensors | {name: torch.from_numpy(bias.astype(np.float32)) for name, bias in zip(names, made, strict=True)}


def save(folder: Path, tensors: Tensors, quantization: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """A folder of `tensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**CONFIG, **config} | ({} if quantization is None else {"quantization_config": quantization})
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def both_forms(form: Format) -> tuple[Tensors, Tensors]:
    """The tensors of a model in `form`, and those of the same model as plain float32."""
    random = np.random.default_rng(7)
    coded, plain = plain_tensors(random), {}
    plain |= coded
    for layer in (0, 1):
        for name, (rows, inputs) in SHAPES.items():
            at = f"model.layers.{layer}.{name}"
            made = random_codes(form, rows, inputs, random)
            plain[f"{at}.weight"] = made.weight()
            parts = {"weight": made.weight()} if name in form.excluded else form.write(form, made)
            coded |= {f"{at}.{suffix}": tensor for suffix, tensor in parts.items()}
    return coded, plain
