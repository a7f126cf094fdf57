"""What a quantised checkpoint holds, whichever tool wrote it, in one description.

`quantized_config` turns a file's `quantization_config` into a `Quantization`; `quantized_tensors` turns a layer's
tensors and its `Scheme` into `kernels.coded.CodedWeights`. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

Packing = Literal["gptq", "gptq_v2", "awq_gemm", "awq_gemv", "packed", "plain", "table"]
"""How codes lie in tensors.

gptq      qweight int32 [K bits / 32, N], qzeros (one less than the zero) [G, N bits / 32], scales [G, N], g_idx [K]
gptq_v2   the same, qzeros as they are
awq_gemm  qweight int32 [K, N / 8] and qzeros [G, N / 8], columns in the order 0 2 4 6 1 3 5 7; scales [G, N]
awq_gemv  qweight int32 [N, K / 8], qzeros [N, words], scales [N, 8 words], words padded
packed    weight_packed int32 [N, K bits / 32], weight_scale [N, G], weight_zero_point [N bits / 32, G], weight_shape
table     weight uint8 [N K / 2, 1], two codes a byte, weight.quant_map [16], weight.absmax for all, weight.quant_state
plain     weight int8 or FP8 (e4m3) [N, K], weight_scale for all, a row, a group or a block of it
          (bitsandbytes: SCB [N], 127 times the scale, and weight_format, which is 0; torchao: _weight_qdata and so on)
"""

BITS: Final = (2, 3, 4, 8)
INVERSE: Final = "weight_scale_inv"
"""What the format fp8 calls its scales; codes are multiplied by them all the same."""


@dataclass(frozen=True, slots=True)
class Activations:
    """How the format quantises the rows of a product; `group` inputs share a scale, None: a whole row does."""

    kind: Literal["int8", "fp8"]
    dynamic: bool
    """False: one scale for everything, in the tensor `input_scale`."""
    group: int | None = None
    by_inverse: bool = False
    """Rows are multiplied by the inverse of their scale, not divided by it."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weight [N, K] of one linear layer is stored."""

    packing: Packing
    bits: int
    group: int | None = None
    """Inputs that share a scale; None: all."""
    fp8: bool = False
    table: str = ""
    """The name of what 4-bit codes stand for (nf4, fp4); empty: integers."""
    symmetric: bool = True
    """False: zero points are stored."""
    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale, in place of `group`."""
    per_tensor: bool = False
    """One scale for the whole weight."""
    ordered: bool = False
    """Inputs are in groups by a table (desc_act's `g_idx`), not by their place."""
    activations: Activations | None = None
    scale_name: str = "weight_scale"
    codes_name: str = "weight"
    """As `scale_name` and `zeros_name` of the packing "plain" only."""
    zeros_name: str = "weight_zero_point"
    steps: int = 1
    """Scales are stored that many times as large (bitsandbytes: 127, what the largest code stands for)."""

    def describe(self) -> str:
        """For people: "int4, groups of 128", "fp8, blocks of 128 x 128, activations fp8"."""
        parts = [self.table or ("fp8" if self.fp8 else f"int{self.bits}")]
        if self.block is not None:
            parts.append(f"blocks of {self.block[0]} x {self.block[1]}")
        elif self.per_tensor:
            parts.append("one scale")
        else:
            parts.append("one scale a row" if self.group is None else f"groups of {self.group}")
        parts += [] if self.symmetric else ["zero points"]
        parts += ["ordered"] if self.ordered else []
        parts += [] if self.activations is None else [f"activations {self.activations.kind}"]
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which layers a rule is for: one by name, those that a regular expression finds, or all ("Linear")."""

    text: str
    kind: Literal["name", "match", "search", "all"]

    def fits(self, layer: str) -> bool:
        """True when `layer`, such as `model.layers.0.mlp.up_proj`, is meant."""
        if self.kind == "name":
            return layer == self.text
        if self.kind == "match":
            return re.match(self.text, layer) is not None
        return self.kind == "all" or re.search(self.text, layer) is not None


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds for the layers of `pattern`; scheme None: they are not quantised."""

    pattern: Pattern
    scheme: Scheme | None


@dataclass(frozen=True, slots=True)
class Quantization:
    """A checkpoint's quantisation: the first rule that fits a layer says how it is stored."""

    method: str
    """gptq, awq, auto-round, compressed-tensors, fp8, bitsandbytes or torchao."""
    rules: Sequence[Rule]
    facts: str = field(repr=False, default="")
    """The configuration in a fixed spelling: part of the model's identity, since it says what the bytes mean."""
    kv_scales: str = ""
    """The type of cache that every attention layer has a `k_scale` and a `v_scale` for; empty: nothing is said."""

    def scheme(self, layer: str) -> Scheme | None:
        """How the weight of `layer` is stored; None: as plain numbers."""
        return next((rule.scheme for rule in self.rules if rule.pattern.fits(layer)), None)
