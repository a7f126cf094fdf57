"""Quantised folders: the bits of the same weights as plain float32, near them with int8, refusals that name tensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from quantized_folders import FORMATS, Tensors, ao, both_forms, compressed, grain, plain_tensors, save
from row_promise import random_prompts, same_bits

from engine.config import EngineConfig
from engine.models.loader import load_model
from engine.weights import model_id, open_checkpoint
from tandem.errors import ModelFormatError

if TYPE_CHECKING:
    from conftest import MakeDriver

PROMPTS = random_prompts(2, 20, 97)
LAYER = "model.layers.1.mlp.up_proj"
KV_SCHEME = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize("name", FORMATS)
def test_exact_gives_the_bits_of_the_plain_weights(
    name: str, tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None
) -> None:
    coded, plain = both_forms(FORMATS[name])
    drivers = [
        make_driver(save(tmp_path / "coded", coded, FORMATS[name].config), sequences=2),
        make_driver(save(tmp_path / "plain", plain), sequences=2),
    ]
    one, other = (driver.run(PROMPTS, chunk=7) for driver in drivers)
    assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))
    if FORMATS[name].bits < 8:
        assert drivers[0].model.nbytes < drivers[1].model.nbytes / 2


@pytest.mark.parametrize("name", FORMATS)
def test_int8_is_near(name: str, tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None) -> None:
    coded, _ = both_forms(FORMATS[name])
    folder = save(tmp_path / "coded", coded, FORMATS[name].config)
    exact, near = (make_driver(folder, compute=compute).run(PROMPTS[:1], 20)[0] for compute in ("exact", "int8"))
    assert float((near - exact).norm() / exact.norm()) < 0.05


def test_layers_may_be_of_several_groups_and_ignored(
    tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None
) -> None:
    config = compressed("mixed-precision")
    config["config_groups"]["group_0"] |= {"format": "pack-quantized"}
    eight = compressed("int-quantized", num_bits=8, strategy="channel", group_size=None)["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = eight | {"targets": ["re:.*down_proj"], "format": "int-quantized"}
    config["ignore"] = ["lm_head", "re:.*k_proj"]
    four, plain = both_forms(FORMATS["packed-symmetric"])
    whole, whole_plain = both_forms(FORMATS["int8-row"])
    coded = {name: tensor for name, tensor in four.items() if "down_proj" not in name and "k_proj" not in name}
    coded |= {name: tensor for name, tensor in whole.items() if "down_proj" in name}
    coded |= {name: tensor for name, tensor in plain.items() if "k_proj" in name}
    plain |= {name: tensor for name, tensor in whole_plain.items() if "down_proj" in name}
    one = make_driver(save(tmp_path / "coded", coded, config)).run(PROMPTS[:1], 20)[0]
    assert same_bits(one, make_driver(save(tmp_path / "plain", plain)).run(PROMPTS[:1], 20)[0])


def test_int8_activations_are_those_of_the_format(tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None) -> None:
    """Close to the weights alone, and not the same: rows are quantised."""
    coded, _ = both_forms(FORMATS["int8-row"])
    plain_config = FORMATS["int8-row"].config
    config = copy.deepcopy(dict(plain_config))
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config["config_groups"]["group_0"]["input_activations"] = activations
    weights_only = make_driver(save(tmp_path / "weights", coded, plain_config)).run(PROMPTS[:1], 20)[0]
    both = make_driver(save(tmp_path / "both", coded, config), sequences=2)
    alone = both.run(PROMPTS[:1], 20)[0]
    assert 0 < float((alone - weights_only).norm() / weights_only.norm()) < 0.05
    assert same_bits(alone, both.run(PROMPTS, 3)[0])


@pytest.mark.parametrize(
    ("kind", "dtype", "another", "largest"),
    [("float", "float8_e4m3", "int8", 448), ("int", "int8", "float8_e4m3", 127)],
)
def test_a_kv_cache_scheme_comes_with_its_scales(
    kind: str, dtype: str, another: str, largest: int, tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None
) -> None:
    """They are used by a cache of their type; another finds its own."""
    form = FORMATS["packed-symmetric"]
    coded, _ = both_forms(form)
    names = [f"model.layers.{layer}.self_attn.{part}_scale" for layer in (0, 1) for part in "kv"]
    scales = {name: torch.tensor((4.5 + 0.9 * number) / largest) for number, name in enumerate(names)}
    scheme = KV_SCHEME | {"type": kind}
    fixed = save(tmp_path / "fixed", {**coded, **scales}, {**form.config, "kv_cache_scheme": scheme})
    plain = save(tmp_path / "plain", coded, form.config)

    def logits(folder: Path, kv_dtype: str) -> torch.Tensor:
        return make_driver(folder, kv_dtype=kv_dtype).run(PROMPTS[:1], 20)[0]

    one, exact = logits(fixed, dtype), logits(fixed, "float32")
    assert not same_bits(one, logits(plain, dtype))
    assert float((one - exact).norm() / exact.norm()) < 0.1
    assert same_bits(logits(fixed, another), logits(plain, another))


def test_a_dynamic_kv_cache_scheme_has_no_scales(tmp_path: Path) -> None:
    form = FORMATS["packed-symmetric"]
    coded, _ = both_forms(form)
    folder = save(tmp_path / "dynamic", coded, {**form.config, "kv_cache_scheme": KV_SCHEME | {"dynamic": True}})
    load_model(open_checkpoint(folder), EngineConfig(model=str(folder), kv_dtype="float8_e4m3"))


def test_the_configuration_is_part_of_the_identity(tmp_path: Path) -> None:
    coded, _ = both_forms(FORMATS["gptq"])
    config = dict(FORMATS["gptq"].config)
    one = model_id(save(tmp_path / "one", coded, config))
    assert one == model_id(save(tmp_path / "same", coded, config))
    assert one != model_id(save(tmp_path / "other", coded, config | {"checkpoint_format": "gptq_v2"}))


def test_a_quantised_head_has_its_own_weight(tmp_path: Path, make_driver: MakeDriver, cpp_kernels: None) -> None:
    """Even where the configuration ties it to the embeddings: what the file holds wins."""
    coded, plain = both_forms(FORMATS["packed-symmetric"])
    at = "model.layers.0.mlp.gate_proj"
    for tensors, suffixes in ((coded, ("weight_packed", "weight_scale", "weight_shape")), (plain, ("weight",))):
        del tensors["lm_head.weight"]
        for suffix in suffixes:
            tensors[f"lm_head.{suffix}"] = tensors[f"{at}.{suffix}"].clone()
    table = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    coded["model.embed_tokens.weight"] = plain["model.embed_tokens.weight"] = table
    config = compressed("pack-quantized") | {"ignore": []}
    shape = {"vocab_size": 128, "tie_word_embeddings": True}
    one = make_driver(save(tmp_path / "coded", coded, config, **shape)).run(PROMPTS[:1], 20)[0]
    other = make_driver(save(tmp_path / "plain", plain, **shape)).run(PROMPTS[:1], 20)[0]
    assert same_bits(one, other)


def drop(*suffixes: str) -> Callable[[Tensors], None]:
    """Take tensors of `LAYER` away."""

    def change(tensors: Tensors) -> None:
        for suffix in suffixes:
            del tensors[f"{LAYER}.{suffix}"]

    return change


def put(suffix: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    """Another tensor of `LAYER`."""

    def change(tensors: Tensors) -> None:
        tensors[f"{LAYER}.{suffix}"] = tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq", drop("scales"), r"up_proj\.scales is missing; expected float16 or bfloat16 or float32 \(2, 128\)"),
        ("gptq", drop("qzeros"), r"up_proj\.qzeros is missing; expected int32 \(2, 16\)"),
        ("gptq", drop("qweight"), r"up_proj\.qweight is missing; expected beside .*up_proj\.qzeros"),
        ("gptq", drop("qweight", "qzeros", "scales"), r"tensor .*up_proj\.weight is missing"),
        ("gptq", put("scales", torch.ones(2, 127).half()), r"up_proj\.scales is float16 \(2, 127\); expected"),
        ("gptq", put("qweight", torch.ones(9, 128, dtype=torch.int32)), r"expected \(128, 64\)"),
        ("gptq", put("qweight", torch.ones(8, 128)), r"up_proj\.qweight is float32 \(8, 128\); expected int32"),
        ("gptq", put("weight", torch.ones(128, 64)), r"up_proj\.qweight and .*up_proj\.weight are two weights"),
        ("gptq-ordered", drop("g_idx"), r"up_proj\.g_idx is missing; expected int32 \(64,\)"),
        (
            "gptq-ordered",
            put("g_idx", torch.full((64,), 2, dtype=torch.int32)),
            r"names groups 2 to 2; expected 0 to 1",
        ),
        ("awq-gemv", put("qzeros", torch.ones(128, 1, dtype=torch.int32)), r"expected int32 \(128, 4\)"),
        ("packed-symmetric", drop("weight_scale"), r"up_proj\.weight_scale is missing"),
        ("packed-symmetric", drop("weight_shape"), r"up_proj\.weight_shape is missing; expected int64 or int32 \(2,\)"),
        ("packed-symmetric", put("weight_shape", torch.tensor([128, 72])), r"weight_packed is int32 .*\(128, 9\)"),
        ("packed-zeros", drop("weight_zero_point"), r"up_proj\.weight_zero_point is missing; expected int32 \(16, 2\)"),
        ("torchao-8", drop("_weight_scale"), r"up_proj\._weight_scale is missing; expected float16 or .* \(128, 1\)"),
        ("torchao-8", drop("_weight_qdata"), r"up_proj\._weight_qdata as int8 or FP8 is missing; expected beside"),
        ("torchao-8", put("_weight_act_pre_scale", torch.ones(64)), r"up_proj\._weight_act_pre_scale is there, but"),
        ("bitsandbytes-8", drop("SCB"), r"up_proj\.SCB is missing; expected float16 or .* \(128, 1\) or \(128,\)"),
        ("bitsandbytes-8", drop("weight_format"), r"up_proj\.weight_format is missing; expected uint8 \(\) or \(1,\)"),
        ("bitsandbytes-8", put("weight_format", torch.ones(1, dtype=torch.uint8)), "weight_format is not 0; expected"),
        ("int8-row", drop("weight"), r"up_proj\.weight as int8 or FP8 is missing; expected beside"),
        ("int8-row", put("weight", torch.ones(128, 64)), r"expected beside .*up_proj\.weight_scale"),
        ("int8-row", put("weight_scale", torch.ones(128, 2)), r"weight_scale is float32 \(128, 2\); expected"),
    ],
)
def test_broken_tensors_are_named(name: str, change: Callable[[Tensors], None], message: str, tmp_path: Path) -> None:
    coded, _ = both_forms(FORMATS[name])
    change(coded)
    folder = save(tmp_path / "broken", coded, FORMATS[name].config)
    with pytest.raises(ModelFormatError, match=message):
        load_model(open_checkpoint(folder), EngineConfig(model=str(folder)))


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`config` with other settings of its first group."""
    config["config_groups"]["group_0"] |= changes
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("gptq", "quantization_config: must be an object"),
        ({"bits": 4}, "quant_method: is missing"),
        (
            {"quant_method": "hqq"},
            "quant_method: 'hqq' is not supported; known: gptq, awq, auto-round, compressed-tensors",
        ),
        ({"quant_method": "gptq"}, "bits: is missing"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "bits: 5 is not supported; known: 2, 3, 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size: must be -1 or"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin' is not supported; known: gptq"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"(": {}}}, r"'\(' is no regular expression"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, "'gemv_fast' is not supported; known: gemm, gemv"),
        ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "backend: 'llm-awq' is not supported"),
        ({"quant_method": "awq", "bits": 8}, "bits: 8 is not supported; AWQ has 4"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:fp8"}, "'auto_round:fp8' is not"),
        ({"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}, "data_type 'int'"),
        ({"quant_method": "auto-round", "bits": 4, "spinquant_config": {"r3": True}}, "spinquant_config: is not"),
        (
            {"quant_method": "auto-round", "bits": 4, "extra_config": {"lm_head": {"bits": 8, "act_bits": 8}}},
            "extra_config 'lm_head': act_bits: quantised activations are not",
        ),
        ({"quant_method": "torchao"}, "quant_type: must be an object with one key, default"),
        (
            ao("Int4WeightOnlyConfig"),
            "quant_type: 'Int4WeightOnlyConfig' is not supported; known: Int8WeightOnlyConfig",
        ),
        (ao("Float8DynamicActivationFloat8WeightConfig"), "granularity: 'PerTensor' of rows is not supported, since"),
        (
            ao("Int8WeightOnlyConfig", granularity=grain("PerToken")),
            "granularity: 'PerToken' is not supported; known: ",
        ),
        (ao("Int8WeightOnlyConfig", granularity=grain("PerGroup")), "granularity: group_size: is missing"),
        (
            ao(
                "Int8DynamicActivationInt8WeightConfig",
                act_mapping_type={"_type": "MappingType", "_data": "ASYMMETRIC"},
            ),
            "act_mapping_type: 'ASYMMETRIC' is not supported; known: SYMMETRIC",
        ),
        (ao("Int8DynamicActivationInt8WeightConfig", reduce_range=True), "reduce_range: is not supported"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit: must be true, or load_in_8bit"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
            "bnb_4bit_quant_storage: 'bfloat16' is not supported; known: uint8",
        ),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt: 'e5m2' is not supported; known: e4m3"),
        ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "scale_fmt: 'ue8m0' is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "must be two integers over 0"),
        (compressed("nvfp4-pack-quantized"), "format: 'nvfp4-pack-quantized' is not supported; known: pack-quantized"),
        (
            compressed("pack-quantized") | {"kv_cache_scheme": KV_SCHEME | {"num_bits": 4}},
            "kv_cache_scheme: is supported as symmetric float 8 or int 8 only",
        ),
        (
            compressed("pack-quantized") | {"kv_cache_scheme": KV_SCHEME | {"strategy": "attn_head"}},
            "kv_cache_scheme: is supported with strategy 'tensor' only, unless it is dynamic",
        ),
        (compressed("pack-quantized") | {"quantization_status": "calibration"}, "must be compressed or frozen, not"),
        (compressed("pack-quantized") | {"config_groups": {}}, "config_groups: must be an object that is not empty"),
        (compressed("pack-quantized") | {"ignore": ["re:("]}, "is no regular expression"),
        (compressed("pack-quantized", num_bits=5), "int 5 is not supported; known: int 2, 3, 4, 8, float 8"),
        (compressed("float-quantized", num_bits=4, type="float"), "float 4 is not supported"),
        (compressed("float-quantized", num_bits=8, type="float", symmetric=False), "symmetric: must be true with type"),
        (compressed("pack-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "but for format 'dense'"),
        (compressed("pack-quantized", strategy="tensor_group"), "strategy: 'tensor_group' is not supported"),
        (
            changed(compressed("int-quantized"), input_activations={"strategy": "tensor", "dynamic": True}),
            "strategy: tensor with dynamic True is not supported",
        ),
    ],
)
def test_configurations_that_nobody_reads_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "odd", plain_tensors(np.random.default_rng(1)), config)
    with pytest.raises(ModelFormatError, match=message):
        open_checkpoint(folder)


def test_codes_of_layers_that_the_configuration_leaves_alone(tmp_path: Path) -> None:
    coded, _ = both_forms(FORMATS["packed-symmetric"])
    config = compressed("pack-quantized") | {"ignore": ["re:.*up_proj"]}
    with pytest.raises(ModelFormatError, match=r"leaves model\.layers\.0\.mlp\.up_proj alone"):
        open_checkpoint(save(tmp_path / "odd", coded, config))


def test_a_truncated_file_and_an_index_that_lies(tmp_path: Path) -> None:
    coded, _ = both_forms(FORMATS["gptq"])
    folder = save(tmp_path / "short", coded, FORMATS["gptq"].config)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        ModelFormatError, match=r"truncated: tensor model\.\S+ is expected to end at byte \d+, the file"
    ):
        open_checkpoint(folder)
    shard = folder / "model-00001-of-00001.safetensors"
    file.rename(shard)
    save(tmp_path / "whole", coded, FORMATS["gptq"].config)
    shard.write_bytes((tmp_path / "whole" / "model.safetensors").read_bytes())
    index = {"weight_map": dict.fromkeys(coded, shard.name) | {f"{LAYER}.g_idx": shard.name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFormatError, match=r"up_proj\.g_idx is in no shard; expected in model-00001"):
        open_checkpoint(folder)
