"""Quantised checkpoints on the device path: products take the file's codes, and give what the tool's inference says."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))  # tests are no package
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from gpu_stand_in import load
from quantized_folders import FORMATS, biased, both_forms, save

from engine.batch import Batch, SampleSpec, Slice
from engine.loading import Engine
from kernels.coded import FP8, CodedWeights, Rounding
from kernels.dense import DenseLinear
from kernels.triton.products import GroupLinear, ScaledLinear, SideBySide, stored_product
from tandem.record import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")
DATA = Path(__file__).parents[2] / "data" / "quantized"
VOCABULARY = 256
FORMS = {
    # name -> the product that serves q, k, v, and how far log probabilities may be from the tool's
    "int4": (GroupLinear, 0.01),
    "gptq-v2": (GroupLinear, 0.05),
    "gptq-3": (GroupLinear, 0.05),
    "awq": (GroupLinear, 0.05),
    "int8": (ScaledLinear, 0.15),
    "fp8": (ScaledLinear, 0.3),
    "fp8-block": (ScaledLinear, 0.3),
    "mixed": (SideBySide, 0.15),
    "gptq-ordered": (DenseLinear, 0.01),
}


def log_probabilities(engine: Engine, prompt: list[int], vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Of what comes after `prompt`: float32 [V]."""
    spec = SampleSpec(0, SamplingParams(temperature=0.0), 0, prompt, logprobs=vocabulary)
    output = engine.runner.run(Batch([Slice("s", prompt, 0, list(range(8)), [spec])]))
    found = output.samples[0][0].logprobs
    assert found is not None
    values = torch.empty(vocabulary)
    values[torch.tensor(found.top_token_ids)] = torch.tensor(found.top_logprobs)
    return values


@pytest.mark.parametrize("name", FORMS)
def test_a_tool_s_checkpoint_is_served_by_its_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, most = FORMS[name]
    expand, expanded = CodedWeights.dequantized, []

    def recorded(weights: CodedWeights) -> torch.Tensor:
        expanded.append(weights)
        return expand(weights)

    monkeypatch.setattr(CodedWeights, "dequantized", recorded)
    engine = load(DATA / name)
    layer = engine.runner.model.layers[0]
    assert isinstance(layer.qkv, kind)
    assert bool(expanded) == (kind is DenseLinear)
    expected = load_file(DATA / name / "expected.safetensors")
    prompt = expected["prompt"].tolist()
    want = expected["logits"][len(prompt) - 1].log_softmax(-1)
    got = log_probabilities(engine, prompt)
    assert float((got - want).square().mean().sqrt()) < most
    assert int(got.argmax()) == int(expected["continuation"][0])


@pytest.mark.parametrize("excluded", ["self_attn.k_proj", "mlp.down_proj"])
def test_parts_with_biases_are_what_they_would_be_in_one(excluded: str, tmp_path: Path) -> None:
    """Qwen2's biases on q, k and v, of which k is plain numbers, or none is."""
    form = replace(FORMATS["gptq"], config={**FORMATS["gptq"].config, "dynamic": {f"-:.*{excluded}": {}}})
    coded, plain = both_forms(replace(form, excluded=[excluded]))
    shape = {"model_type": "qwen2", "vocab_size": 97}
    engines = [
        load(save(tmp_path / "coded", biased(coded), form.config, **shape)),
        load(save(tmp_path / "plain", biased(plain), **shape)),
    ]
    qkv = engines[0].runner.model.layers[0].qkv
    assert isinstance(qkv, SideBySide if excluded == "self_attn.k_proj" else GroupLinear)
    prompt = list(range(3, 20))
    one, other = (log_probabilities(engine, prompt, 97) for engine in engines)
    assert float((one - other).abs().max()) < 0.02


def test_codes_take_their_own_memory() -> None:
    """4 bits with a scale and a minimum for 32, or 8 bits; float32 would be 8 and 4 times as much."""
    for name, most in (("int4", 0.2), ("fp8", 0.3)):
        layer = load(DATA / name).runner.model.layers[0]
        assert layer.down.nbytes < 128 * 128 * 4 * most


def test_another_compute_rounds_the_weights_again() -> None:
    layers = [load(DATA / "int8", compute=compute).runner.model.layers[0] for compute in ("native", "int8", "fp8")]
    codes = [layer.down.codes for layer in layers]
    assert torch.equal(codes[0], codes[1])
    assert [part.dtype for part in codes] == [torch.int8, torch.int8, FP8]


def coded(rows: int, inputs: int, *, kind: str = "fp8", seed: int = 0, **changes: Any) -> CodedWeights:
    """A random weight with a scale a row."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, inputs, generator=generator) * 20
    codes = (
        values.to(FP8).view(torch.uint8) if kind == "fp8" else (values.round().to(torch.int8).view(torch.uint8) ^ 128)
    )
    scales = torch.rand(rows, 1, generator=generator) * 0.01 + 0.001
    parts: dict[str, Any] = {"scales": scales, "group": inputs, "fp8": kind == "fp8", **changes}
    return CodedWeights(codes, bits=8, **parts)


def in_blocks(rows: int, inputs: int, seed: int = 0) -> CodedWeights:
    """FP8 with a scale for 128 x 128."""
    blocks = (
        torch.rand(-(-rows // 128), -(-inputs // 128), generator=torch.Generator().manual_seed(seed)) * 0.01 + 0.001
    )
    scales = blocks.repeat_interleave(128, 0)[:rows].contiguous()
    return coded(rows, inputs, seed=seed, scales=scales, group=128)


CPU = torch.device("cpu")
X = torch.randn(3, 256, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    "parts",
    [
        [coded(40, 256), coded(24, 256, seed=1)],
        [coded(40, 256, rounding=Rounding("fp8"))],
        [coded(40, 256, kind="int8", rounding=Rounding("int8"))],
        [coded(40, 256, rounding=Rounding("fp8", scale=0.01))],
        [in_blocks(128, 256), in_blocks(70, 256, seed=1)],
    ],
    ids=["rows", "rows rounded", "int8", "one scale", "blocks"],
)
def test_products_of_stored_codes(parts: list[CodedWeights]) -> None:
    bias = torch.linspace(-1, 1, sum(part.codes.shape[0] for part in parts))
    product = stored_product(parts, CPU, bias)
    assert product is not None
    want = torch.cat([X @ part.dequantized().T for part in parts], dim=1) + bias
    got = product(X)
    assert 0 < float((got - want).norm() / want.norm()) < 0.05
    assert product.nbytes < 1.2 * sum(part.codes.nbytes for part in parts) + bias.nbytes


@pytest.mark.parametrize(
    "parts",
    [
        [coded(40, 256, kind="int8")],
        [coded(40, 256, kind="int8", rounding=Rounding("int8", group=64))],
        [coded(40, 256, kind="int8", rounding=Rounding("fp8"))],
        [coded(40, 256, order=torch.zeros(256, dtype=torch.int32))],
        [coded(40, 256, kind="int8", rounding=Rounding("int8"), zeros=torch.zeros(40, 1, dtype=torch.uint8))],
        [coded(40, 256), coded(40, 256, rounding=Rounding("fp8", scale=0.5))],
        [in_blocks(70, 256), in_blocks(128, 256)],
        [coded(40, 256, scales=torch.rand(40, 2), group=128)],
        [coded(40, 256, scales=torch.rand(40, 4), group=64)],
    ],
    ids=["no rounding", "groups", "other rows", "ordered", "zeros", "two ways", "amid a block", "rows of 128", "64"],
)
def test_codes_that_no_product_takes(parts: list[CodedWeights]) -> None:
    assert stored_product(parts, CPU) is None
