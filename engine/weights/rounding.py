"""Round to nearest in compressed-tensors' forms: what `tandem quantize` does to one weight.

Scales are as llm-compressor's without calibration: the largest magnitude of what shares a scale, over half of the
codes' range, in the type that the weight itself has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from engine.weights.quantized_codes import pack, packed_words
from kernels.coded import FP8, FP8_MAX

GROUPS: Final = (128, 64, 32)
"""Inputs that share a scale with int4: the first that divides every layer's inputs."""

_ROWS: Final[Mapping[str, Any]] = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor to be written: its suffix, its type's name in safetensors, its shape."""

    suffix: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """One way to store a weight [N, K]. `group`: inputs that share a scale; None: all."""

    name: str
    bits: int
    group: int | None = None

    def parts(self, rows: int, inputs: int, scale_type: str) -> list[Part]:
        """What `write` gives, before it is computed."""
        groups = 1 if self.group is None else inputs // self.group
        scale = Part("weight_scale", scale_type, (rows, groups))
        if self.name == "int4":
            packed = Part("weight_packed", "I32", (rows, packed_words(inputs, 4)))
            return [packed, scale, Part("weight_shape", "I64", (2,))]
        return [Part("weight", "I8" if self.name == "int8" else "F8_E4M3", (rows, inputs)), scale]

    def write(self, weight: Tensor, scale_dtype: torch.dtype) -> list[Tensor]:
        """The tensors of `parts` for a weight float32 [N, K]."""
        rows, inputs = weight.shape
        half = {"int4": 7.5, "int8": 127.5, "fp8": FP8_MAX}[self.name]
        blocks = weight.view(rows, -1, inputs if self.group is None else self.group)
        scales = (blocks.abs().amax(-1) / half).to(scale_dtype)
        # An all-zero group divides by something; its codes are 0 whatever it is.
        scales = torch.where(scales == 0, torch.finfo(scale_dtype).eps, scales)
        scaled = (blocks / scales.float()[..., None]).view(rows, inputs)
        if self.name == "fp8":
            return [scaled.clamp_(-FP8_MAX, FP8_MAX).to(FP8), scales]
        if self.name == "int8":
            return [scaled.round_().clamp_(-128, 127).to(torch.int8), scales]
        codes = (scaled.round_().clamp_(-8, 7) + 8).to(torch.uint8)
        return [pack(codes, 4), scales, torch.tensor([rows, inputs])]

    def config(self) -> dict[str, Any]:
        """The `quantization_config` of a model whose linear layers, but for the LM head, are of this form."""
        kind = "float" if self.name == "fp8" else "int"
        strategy = "channel" if self.group is None else "group"
        weights = {"num_bits": self.bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False}
        weights |= {} if self.group is None else {"group_size": self.group}
        inputs = None if self.name == "int4" else {**_ROWS, "type": kind}
        form = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}[self.name]
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": form,
            "config_groups": {"group_0": {**group, "format": form}},
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
        }


def _int4(inputs: frozenset[int]) -> Form:
    return Form("int4", 4, next((group for group in GROUPS if all(width % group == 0 for width in inputs)), None))


FORMS: Final[Mapping[str, Callable[[frozenset[int]], Form]]] = {
    "int4": _int4,
    "int8": lambda inputs: Form("int8", 8),
    "fp8": lambda inputs: Form("fp8", 8),
}
"""Name -> the form for a model whose linear layers have these numbers of inputs."""
