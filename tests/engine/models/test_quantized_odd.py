"""What the tools' own files have beside the plain case: older spellings, tensors beside codes, odd numbers."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from quantized_folders import FORMATS, Tensors, ao, biased, both_forms, compressed, grain, save
from row_promise import random_prompts, same_bits

from engine.config import EngineConfig
from engine.models import int8_loader
from engine.models.loader import load_model
from engine.weights import int8_codes, open_checkpoint
from engine.weights.fields import Fields
from engine.weights.quantized import Activations, Quantization
from engine.weights.quantized_config import quantization
from kernels.coded import FP8, CodedWeights
from tandem.errors import ModelFormatError

if TYPE_CHECKING:
    from conftest import MakeDriver

PROMPTS = random_prompts(1, 20, 97)
LAYER = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
KV_SCHEME = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True}
DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def read(config: Mapping[str, Any]) -> Quantization:
    """As a config.json's."""
    found = quantization(Fields("config.json", {"quantization_config": config}))
    assert found is not None
    return found


def load(folder: Path) -> None:
    """All of it."""
    load_model(open_checkpoint(folder), EngineConfig(model=str(folder)))


def grouped(**groups: tuple[list[str], int]) -> dict[str, Any]:
    """A configuration of compressed-tensors: group -> its targets and bits."""
    config = compressed("pack-quantized")
    one = config["config_groups"].pop("group_0")
    for name, (targets, bits) in groups.items():
        config["config_groups"][name] = {**one, "targets": targets, "weights": {**one["weights"], "num_bits": bits}}
    return config


def test_of_two_expressions_the_first_by_the_alphabet_counts() -> None:
    found = read(grouped(group_0=(["re:.*proj", "Linear"], 4), group_1=(["re:.*down_proj"], 8), group_2=([LAYER], 2)))
    bits = {name: scheme.bits for name in (DOWN, LAYER, "lm") if (scheme := found.scheme(name))}
    assert bits == {DOWN: 8, LAYER: 2, "lm": 4}


def test_of_two_groups_with_one_target_the_last_counts() -> None:
    scheme = read(grouped(group_0=(["Linear"], 4), group_1=(["Linear"], 8))).scheme(LAYER)
    assert scheme is not None
    assert scheme.bits == 8


def test_strategies_are_known_by_the_group_size() -> None:
    for size, group, per_tensor in ((None, None, True), (-1, None, False), (32, 32, False)):
        scheme = read(compressed("pack-quantized", strategy=None, group_size=size)).scheme(LAYER)
        assert scheme is not None
        assert (scheme.group, scheme.per_tensor) == (group, per_tensor)


@pytest.mark.parametrize(
    "noted",
    [
        {"sparsity_config": {"format": "dense", "global_sparsity": 0.14, "sparsity_structure": "unstructured"}},
        {"quantization_status": "frozen"},
    ],
)
def test_what_older_checkpoints_note(noted: dict[str, Any]) -> None:
    assert read(compressed("pack-quantized") | noted).scheme(LAYER) is not None


@pytest.mark.parametrize(
    ("packing", "meant"),
    [("auto", "gptq"), ("auto_round:gptq", "gptq"), ("auto_round:awq", "awq_gemm"), (None, "gptq")],
)
def test_older_spellings_of_autoround(packing: str | None, meant: str) -> None:
    config = {"quant_method": "intel/auto-round", "bits": 4, "group_size": 32, "packing_format": packing}
    found = read(config)
    scheme = found.scheme(LAYER)
    assert scheme is not None
    assert (found.method, scheme.packing) == ("auto-round", meant)


def test_what_torchao_s_words_mean() -> None:
    int8, fp8 = "Int8DynamicActivationInt8WeightConfig", "Float8DynamicActivationFloat8WeightConfig"
    blocks = [grain("PerBlock", block_size=[1, 128]), grain("PerBlock", block_size=[128, 128])]
    meant = [
        (ao(int8), Activations("int8", True, by_inverse=True), None),
        (ao(fp8, granularity=[grain("PerRow", dim=-1)] * 2), Activations("fp8", True), None),
        (ao(fp8, granularity=blocks), Activations("fp8", True, 128), (128, 128)),
        (ao("Float8WeightOnlyConfig"), None, None),
    ]
    for config, activations, block in meant:
        scheme = read(config).scheme(LAYER)
        assert scheme is not None
        assert (scheme.packing, scheme.bits, scheme.group, scheme.per_tensor) == ("plain", 8, None, False)
        assert (scheme.activations, scheme.block, scheme.codes_name) == (activations, block, "_weight_qdata")
    one = read(ao("Int8WeightOnlyConfig", granularity=grain("PerTensor"))).scheme(LAYER)
    assert one is not None
    assert one.per_tensor


def test_biases_of_zeros_that_autogptq_gave_every_layer(
    tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None
) -> None:
    form = FORMATS["gptq"]
    coded, _ = both_forms(form)
    biases = {
        name.replace("qweight", "bias"): torch.zeros(tensor.shape[1]).half()
        for name, tensor in coded.items()
        if name.endswith("qweight")
    }
    one, other = (
        make_driver(save(tmp_path / name, tensors, form.config)).run(PROMPTS, 20)[0]
        for name, tensors in (("with", {**coded, **biases}), ("without", coded))
    )
    assert same_bits(one, other)
    biases[f"{LAYER}.bias"][5] = 0.5
    with pytest.raises(ModelFormatError, match=f"no use for tensor {LAYER}.bias"):
        load(save(tmp_path / "set", {**coded, **biases}, form.config))


@pytest.mark.parametrize("name", ["gptq", "awq-gemm", "int8-row", "gptq-some"])
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_biases_of_a_model_that_has_some(
    name: str, compute: str, tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None
) -> None:
    """Qwen2: on q, k and v, in one product whose parts are codes."""
    form = FORMATS[name]
    coded, plain = both_forms(form)
    config = {"model_type": "qwen2"}
    one, other, without = (
        make_driver(save(tmp_path / folder, tensors, settings, **config), compute=compute).run(PROMPTS, 20)[0]
        for folder, tensors, settings in (
            ("coded", biased(coded), form.config),
            ("plain", biased(plain), None),
            ("zeros", {n: t * (not n.endswith(".bias")) for n, t in biased(coded).items()}, form.config),
        )
    )
    assert distance(without, other) > 0.05
    assert same_bits(one, other) if compute == "exact" else distance(one, other) < 0.05


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative, by the Euclidean norm."""
    return float((one - other).norm() / other.norm())


def rounding_rows(**activations: Any) -> dict[str, Any]:
    """The configuration of "int8-row" with activations."""
    config: dict[str, Any] = copy.deepcopy(dict(FORMATS["int8-row"].config))
    config["config_groups"]["group_0"]["input_activations"] = {**DYNAMIC, **activations}
    return config


STATIC = {"strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, r"up_proj\.input_scale is missing; expected float16 or bfloat16 or float32 \(\) or \(1,\)"),
        (0.0, r"up_proj\.input_scale is 0.0; expected one over 0"),
        (math.nan, r"up_proj\.input_scale is nan; expected one over 0"),
        (-0.5, r"up_proj\.input_scale is -0.5; expected one over 0"),
        (math.inf, r"up_proj\.input_scale is inf; expected one over 0"),
    ],
)
def test_scales_of_rows_must_be_over_0(scale: float | None, message: str, tmp_path: Path) -> None:
    coded, _ = both_forms(FORMATS["int8-row"])
    layers = [name.removesuffix(".weight_scale") for name in coded if name.endswith("weight_scale")]
    coded |= {f"{layer}.input_scale": torch.tensor(0.01) for layer in layers}
    del coded[f"{LAYER}.input_scale"]
    if scale is not None:
        coded[f"{LAYER}.input_scale"] = torch.tensor([scale])
    with pytest.raises(ModelFormatError, match=message):
        load(save(tmp_path / "odd", coded, rounding_rows(**STATIC)))


def test_rows_that_can_t_be_rounded_in_groups_are_refused_while_loading(tmp_path: Path) -> None:
    coded, _ = both_forms(FORMATS["int8-row"])
    folder = save(tmp_path / "odd", coded, rounding_rows(strategy="group", group_size=48))
    with pytest.raises(ModelFormatError, match=r"q_proj: rows of 64 inputs do not divide into groups of 48"):
        load(folder)


def _float8(tensors: Tensors) -> None:
    for name, tensor in list(tensors.items()):
        if tensor.dtype is torch.int8:
            tensors[name] = (tensor.float() / 16).to(FP8)


@pytest.mark.parametrize(
    ("name", "config", "suffix", "change"),
    [
        ("int8-row", FORMATS["int8-row"].config, "input_scale", None),
        ("gptq", FORMATS["gptq"].config, "weight_zero_point", None),
        (
            "int8-row",
            compressed("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None),
            "weight_zero_point",
            _float8,
        ),
    ],
)
def test_what_nobody_reads_beside_codes_is_refused(
    name: str, config: Mapping[str, Any], suffix: str, change: Callable[[Tensors], None] | None, tmp_path: Path
) -> None:
    coded, _ = both_forms(FORMATS[name])
    if change is not None:
        change(coded)
    coded[f"{LAYER}.{suffix}"] = torch.ones(1)
    with pytest.raises(ModelFormatError, match=f"tensor {LAYER}.{suffix} is there, but quantization_config says"):
        load(save(tmp_path / "odd", coded, config))


def test_a_kv_cache_scheme_without_its_scales_is_refused(tmp_path: Path) -> None:
    form = FORMATS["packed-symmetric"]
    coded, _ = both_forms(form)
    config = {**form.config, "kv_cache_scheme": KV_SCHEME}
    scales = {f"model.layers.{layer}.self_attn.{part}_scale": torch.tensor(0.01) for layer in (0, 1) for part in "kv"}
    load(save(tmp_path / "whole", {**coded, **scales}, config))
    with pytest.raises(
        ModelFormatError, match=r"tensor model\.layers\.0\.self_attn\.k_scale is missing, which kv_cache"
    ):
        open_checkpoint(save(tmp_path / "none", coded, config))
    del scales["model.layers.1.self_attn.v_scale"]
    with pytest.raises(
        ModelFormatError, match=r"tensor model\.layers\.1\.self_attn\.v_scale is missing, which kv_cache"
    ):
        open_checkpoint(save(tmp_path / "some", {**coded, **scales}, config))


def test_a_folder_as_older_autogptq_wrote_it(tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None) -> None:
    """Settings beside config.json, and the file by the name of its bits."""
    form = FORMATS["gptq-ordered"]
    coded, _ = both_forms(form)
    new = save(tmp_path / "new", coded, form.config)
    old = save(tmp_path / "old", coded)
    settings = {key: value for key, value in form.config.items() if key not in ("quant_method", "checkpoint_format")}
    (old / "quantize_config.json").write_text(
        json.dumps({**settings, "damp_percent": 0.01, "model_file_base_name": None})
    )
    (old / "model.safetensors").rename(old / "gptq_model-4bit-32g.safetensors")
    one, other = (make_driver(folder).run(PROMPTS, 20)[0] for folder in (new, old))
    assert same_bits(one, other)
    (old / "gptq_model-8bit-32g.safetensors").write_bytes(b"")
    with pytest.raises(ModelFormatError, match=r"has config\.json but no weights"):
        open_checkpoint(old)


@pytest.mark.parametrize("name", ["gptq", "packed-symmetric"])
def test_codes_without_a_configuration_are_refused(name: str, tmp_path: Path) -> None:
    coded, _ = both_forms(FORMATS[name])
    with pytest.raises(
        ModelFormatError, match=r"quantization_config is missing, and tensor .*_proj\.(qweight|weight_pa)"
    ):
        open_checkpoint(save(tmp_path / "odd", coded))


def pieces(
    name: str,
    folder: Path,
    make_driver: MakeDriver,
    monkeypatch: pytest.MonkeyPatch,
    owners: Sequence[Any],
    function: str,
    size: Callable[[Any], int],
) -> list[int]:
    """Sizes of what `function` is called with where 500 elements go at a time; the bits are those of all at once."""
    coded, _ = both_forms(FORMATS[name])
    save(folder, coded, FORMATS[name].config)
    whole = make_driver(folder, compute="int8").run(PROMPTS, 20)[0]
    monkeypatch.setattr(int8_codes, "CHUNK_ELEMENTS", 500)
    real, sizes = getattr(owners[0], function), []

    def recorded(weight: Any) -> Any:
        sizes.append(size(weight))
        return real(weight)

    for owner in owners:
        monkeypatch.setattr(owner, function, recorded)
    assert same_bits(make_driver(folder, compute="int8").run(PROMPTS, 20)[0], whole)
    return sizes


@pytest.mark.parametrize("name", ["gptq-ordered", "gptq-8"])
def test_int8_makes_float32_of_some_rows_at_a_time(
    name: str, tmp_path: Path, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch, cpp_kernels: None
) -> None:
    owners, size = [CodedWeights], lambda weights: weights.codes.numel()
    sizes = pieces(name, tmp_path / "coded", make_driver, monkeypatch, owners, "dequantized", size)
    assert sizes
    assert max(sizes) <= 500


@pytest.mark.parametrize("name", ["packed-symmetric", "gptq-ordered"])
def test_int8_rounds_some_rows_at_a_time_of_plain_weights_too(
    name: str, tmp_path: Path, make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch, cpp_kernels: None
) -> None:
    """The LM head is the largest weight, and mostly plain."""
    owners, size = [int8_codes, int8_loader], lambda weight: weight.numel()
    sizes = pieces(name, tmp_path / "coded", make_driver, monkeypatch, owners, "quantize_weight", size)
    assert sum(sizes) >= 97 * 64
    assert max(sizes) <= 500
