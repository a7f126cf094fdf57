"""Folders of 8-bit floats and of codes of a table: the bits of the same weights as plain float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from quantized_folders import FORMATS, Tensors, both_forms, compressed, save
from row_promise import random_prompts, same_bits

from kernels.coded import FP8

if TYPE_CHECKING:
    from conftest import MakeDriver

PROMPTS = random_prompts(2, 20, 97)


def fp8_tensors(scales: Callable[[int, int], torch.Tensor], suffix: str) -> tuple[Tensors, Tensors]:
    """A model whose layers are FP8 with `scales(rows, inputs)`, and the same as plain float32."""
    coded, plain = both_forms(FORMATS["gptq"])
    kept = {name: tensor for name, tensor in coded.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    for name, tensor in list(plain.items()):
        if "_proj" not in name:
            continue
        made = scales(*tensor.shape)
        high, wide = -(-tensor.shape[0] // made.shape[0]), -(-tensor.shape[1] // made.shape[1])
        spread = made.float().repeat_interleave(high, 0).repeat_interleave(wide, 1)
        codes = (tensor / spread).to(FP8)
        plain[name] = codes.float() * spread
        kept |= {name: codes, name.removesuffix("weight") + suffix: made}
    return kept, plain


FLOATS = {
    "tensor": (lambda rows, inputs: torch.full((1, 1), 0.01), {"strategy": "tensor"}),
    "channel": (lambda rows, inputs: torch.rand(rows, 1) * 0.01 + 0.01, {"strategy": "channel"}),
    "block": (
        lambda rows, inputs: torch.rand(rows // 32, inputs // 16) * 0.01 + 0.01,
        {"strategy": "block", "block_structure": [32, 16]},
    ),
    "tall block": (
        lambda rows, inputs: torch.rand(1, inputs // 16) * 0.01 + 0.01,
        {"strategy": "block", "block_structure": [1 << 40, 16]},
    ),
}


@pytest.mark.parametrize("kind", FLOATS)
def test_fp8_of_compressed_tensors(kind: str, tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None) -> None:
    scales, strategy = FLOATS[kind]
    coded, plain = fp8_tensors(scales, "weight_scale")
    config = compressed("float-quantized", num_bits=8, type="float", group_size=None, **strategy)
    one = make_driver(save(tmp_path / "coded", coded, config)).run(PROMPTS[:1], 20)[0]
    assert same_bits(one, make_driver(save(tmp_path / "plain", plain)).run(PROMPTS[:1], 20)[0])


@pytest.mark.parametrize("block", [[32, 16], None])
def test_fp8_with_inverse_scales(
    block: list[int] | None, tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None
) -> None:
    scales, _ = FLOATS["tensor" if block is None else "block"]
    coded, plain = fp8_tensors(scales, "weight_scale_inv")
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    one = make_driver(save(tmp_path / "coded", coded, config)).run(PROMPTS[:1], 20)[0]
    assert same_bits(one, make_driver(save(tmp_path / "plain", plain)).run(PROMPTS[:1], 20)[0])


def table_tensors(kind: str, nested: int) -> tuple[Tensors, Tensors]:
    """A model whose layers are 4-bit codes of a table, and the same as plain float32; `nested` scales share a scale."""
    random = torch.Generator().manual_seed(4)
    coded, plain = both_forms(FORMATS["gptq"])
    kept = {name: tensor for name, tensor in coded.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    table = torch.rand(16, generator=random) * 2 - 1
    for name, tensor in list(plain.items()):
        if "_proj" not in name:
            continue
        rows, inputs = tensor.shape
        codes = torch.randint(0, 16, (rows, inputs), generator=random, dtype=torch.uint8)
        state = {"quant_type": kind, "blocksize": 32, "shape": [rows, inputs]}
        scales = torch.rand(rows * inputs // 32, generator=random) * 0.2
        if nested:
            state |= {"nested_blocksize": nested, "nested_offset": 0.125}
            outer = torch.rand(-(-len(scales) // nested), generator=random) * 0.1
            steps = torch.rand(256, generator=random)
            places = torch.randint(0, 256, scales.shape, generator=random, dtype=torch.uint8)
            scales = steps[places.long()] * outer[torch.arange(len(scales)) // nested] + 0.125
            kept |= {f"{name}.nested_quant_map": steps, f"{name}.nested_absmax": outer}
        plain[name] = table[codes.long()] * scales.view(rows, -1).repeat_interleave(32, 1)
        pairs = codes.view(-1, 2)
        kept[name] = (pairs[:, 0] << 4 | pairs[:, 1])[:, None]
        kept[f"{name}.absmax"], kept[f"{name}.quant_map"] = places if nested else scales, table.clone()
        encoded = list(json.dumps(state).encode())
        kept[f"{name}.quant_state.bitsandbytes__{kind}"] = torch.tensor(encoded, dtype=torch.uint8)
    return kept, plain


@pytest.mark.parametrize(("kind", "nested"), [("nf4", 16), ("nf4", 1 << 31), ("fp4", 0)])
def test_codes_of_a_table(kind: str, nested: int, tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None) -> None:
    coded, plain = table_tensors(kind, nested)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    folder = save(tmp_path / "coded", coded, config)
    one = make_driver(folder).run(PROMPTS[:1], 20)[0]
    assert same_bits(one, make_driver(save(tmp_path / "plain", plain)).run(PROMPTS[:1], 20)[0])
    near = make_driver(folder, compute="int8").run(PROMPTS[:1], 20)[0]
    assert float((near - one).norm() / one.norm()) < 0.05
