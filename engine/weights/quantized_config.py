"""From a config.json's `quantization_config` to a `Quantization`, for every tool whose checkpoints are read.

What the keys mean is what the tools do with them: GPTQModel and AutoGPTQ (gptq), AutoAWQ (awq), AutoRound (auto-round),
compressed-tensors (also what llm-compressor writes), transformers' fine-grained FP8 (fp8), bitsandbytes, torchao.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from engine.weights.compressed_config import compressed_rules, kv_scales_dtype
from engine.weights.fields import Fields
from engine.weights.quantized import BITS, INVERSE, Packing, Pattern, Quantization, Rule, Scheme
from engine.weights.quantized_table import BLOCK
from engine.weights.torchao_config import torchao_rules

EVERY: Final = Pattern("", "all")


def quantization(fields: Fields) -> Quantization | None:
    """The quantisation that a config.json's `fields` name; None: the model's weights are plain numbers.

    Raises ModelFormatError naming the key: an unknown method, or a variant that no reader here knows.
    """
    value = fields.get("quantization_config") or fields.get("compression_config")
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise fields.error("quantization_config", "must be an object")
    settings = Fields(f"{fields.source}: quantization_config", value)
    method = settings.text("quant_method").removeprefix("intel/")  # as AutoRound wrote it once
    if method not in METHODS:
        raise settings.error("quant_method", f"{method!r} is not supported; known: {', '.join(METHODS)}")
    rules = METHODS[method](settings)
    kv_scales = kv_scales_dtype(settings) if method == "compressed-tensors" else ""
    return Quantization(method, tuple(rules), json.dumps(value, sort_keys=True), kv_scales)


def _gptq(settings: Fields) -> list[Rule]:
    form = settings.text("checkpoint_format", settings.text("format", "gptq"))
    packings: Mapping[str, Packing] = {"gptq": "gptq", "gptq_v2": "gptq_v2"}
    scheme = _integers(settings, _one_of(settings, "checkpoint_format", form, packings))
    scheme = replace(scheme, ordered=settings.boolean("desc_act", False))
    return [*_overrides(settings, scheme), Rule(EVERY, scheme)]


def _overrides(settings: Fields, scheme: Scheme) -> list[Rule]:
    """GPTQModel's `dynamic`: regular expression -> other settings; "-:" before one leaves its layers alone."""
    found = []
    for text, changes in _object(settings, "dynamic").items():
        pattern = Pattern(settings.expression("dynamic", text.removeprefix("-:").removeprefix("+:")), "match")
        if text.startswith("-:"):
            found.append(Rule(pattern, None))
            continue
        if not isinstance(changes, Mapping):
            raise settings.error("dynamic", f"{text!r} must be an object")
        own = Fields(f"{settings.source}: dynamic {text!r}", {**settings.values, **changes})
        found.append(Rule(pattern, replace(_integers(own, scheme.packing), ordered=own.boolean("desc_act", False))))
    return found


def _awq(settings: Fields) -> list[Rule]:
    # Its words are int32 as AutoAWQ's are, in another order.
    if settings.text("backend", "autoawq") == "llm-awq":
        raise settings.error("backend", "'llm-awq' is not supported; known: autoawq")
    version = settings.text("version", settings.text("checkpoint_format", "gemm")).lower()
    packings: Mapping[str, Packing] = {"gemm": "awq_gemm", "gemv": "awq_gemv"}
    packing = _one_of(settings, "version", version, packings)
    bits = settings.integer("bits", settings.optional_integer("w_bit"))
    if bits != 4:
        raise settings.error("bits", f"{bits} is not supported; AWQ has 4")
    group = _group(settings, "group_size", settings.get("q_group_size"))
    return [Rule(EVERY, Scheme(packing, bits, group, symmetric=False))]


def _auto_round(settings: Fields) -> list[Rule]:
    form = settings.text("packing_format", "auto_round:auto_gptq")
    packings: Mapping[str, Packing] = {
        "auto_round": "gptq_v2",
        "auto_round:gptqmodel": "gptq_v2",
        "auto_round:auto_gptq": "gptq",
        "auto_round:gptq": "gptq",
        "auto": "gptq",
        "auto_round:auto_awq": "awq_gemm",
        "auto_round:awq": "awq_gemm",
    }
    packing = _one_of(settings, "packing_format", form, packings)
    scheme, found = _rounded(settings, packing), []
    for text, changes in _object(settings, "extra_config").items():
        if not isinstance(changes, Mapping):
            raise settings.error("extra_config", f"{text!r} must be an object")
        own = Fields(f"{settings.source}: extra_config {text!r}", {**settings.values, **changes})
        plain = own.integer("bits", 4) >= 16
        names = [Pattern(text, "name"), Pattern(settings.expression("extra_config", text), "search")]
        found += [Rule(name, None if plain else _rounded(own, packing)) for name in names]
    return [*sorted(found, key=lambda rule: rule.pattern.kind != "name"), Rule(EVERY, scheme)]


def _rounded(settings: Fields, packing: Packing) -> Scheme:
    """What AutoRound's settings, of all layers or of some, say of one."""
    if settings.text("data_type", "int") != "int":
        raise settings.error("data_type", "only AutoRound's data_type 'int' is supported")
    for key in ("rotation_config", "spinquant_config"):
        if settings.get(key):
            raise settings.error(key, "is not supported")
    if (settings.optional_integer("act_bits") or 16) < 16:
        raise settings.error("act_bits", "quantised activations are not supported in AutoRound's packings")
    return _integers(settings, packing)


def _fp8(settings: Fields) -> list[Rule]:
    if settings.text("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise settings.error("fmt", f"{settings.text('fmt')!r} is not supported; known: e4m3")
    if settings.text("scale_fmt", "float") not in ("float", "float32"):
        raise settings.error("scale_fmt", f"{settings.text('scale_fmt')!r} is not supported; known: float")
    block = settings.sides("weight_block_size")
    # Rows stay as they are, as in transformers where a device multiplies no FP8: what the weights say, exactly.
    return [Rule(EVERY, Scheme("plain", 8, fp8=True, block=block, per_tensor=block is None, scale_name=INVERSE))]


def _bitsandbytes(settings: Fields) -> list[Rule]:
    if settings.boolean("load_in_8bit", False):
        # Rows stay as they are: the tool keeps columns in 16 bits that stand out in any row of a batch, so what it
        # makes of a row depends on the others.
        return [Rule(EVERY, Scheme("plain", 8, scale_name="SCB", steps=127))]
    if not settings.boolean("load_in_4bit", False):
        raise settings.error("load_in_4bit", "must be true, or load_in_8bit")
    kind = settings.text("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise settings.error("bnb_4bit_quant_type", f"{kind!r} is not supported; known: nf4, fp4")
    storage = settings.text("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise settings.error("bnb_4bit_quant_storage", f"{storage!r} is not supported; known: uint8")
    return [Rule(EVERY, Scheme("table", 4, BLOCK, table=kind))]


def _integers(settings: Fields, packing: Packing) -> Scheme:
    bits = settings.integer("bits")
    if bits not in BITS:
        raise settings.error("bits", f"{bits} is not supported; known: {', '.join(map(str, BITS))}")
    if packing == "awq_gemm" and bits != 4:
        raise settings.error("bits", f"{bits} is not supported; AWQ's packing has 4")
    return Scheme(packing, bits, _group(settings, "group_size"), symmetric=settings.boolean("sym", True))


def _group(settings: Fields, key: str, other: object = None) -> int | None:
    """A group size; -1 means all inputs."""
    value = settings.get(key) if other is None else other
    if value is None or value == -1:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise settings.error(key, f"must be -1 or an integer over 0, not {value!r}")
    return value


def _object(settings: Fields, key: str) -> Mapping[str, object]:
    value = settings.get(key)
    if value is None or value is False:
        return {}
    if not isinstance(value, Mapping):
        raise settings.error(key, "must be an object")
    return {str(name): content for name, content in value.items()}


def _one_of(settings: Fields, key: str, value: str, known: Mapping[str, Packing]) -> Packing:
    if value not in known:
        raise settings.error(key, f"{value!r} is not supported; known: {', '.join(known)}")
    return known[value]


METHODS: Final[Mapping[str, Callable[[Fields], list[Rule]]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "compressed-tensors": compressed_rules,
    "fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "torchao": torchao_rules,
}
