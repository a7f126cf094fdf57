"""torchao's `quant_type` as one rule for all layers that have codes: 8 bits, of weights alone or of rows too.

What it saves in safetensors are the parts of its tensors: `layer._weight_qdata`, `layer._weight_scale` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from engine.weights.fields import Fields
from engine.weights.quantized import Activations, Pattern, Rule, Scheme

_WEIGHTS: Final = ("Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig")
_ROWS_TOO: Final = ("Int8DynamicActivationInt8WeightConfig", "Float8DynamicActivationFloat8WeightConfig")
_REFUSED: Final = ("reduce_range", "weight_only_decode", "activation_value_lb", "activation_value_ub")
_WORDS: Final = {
    "act_mapping_type": "SYMMETRIC",
    "intx_packing_format": "UNPACKED_TO_INT8",
    "packing_format": "PLAIN",
}
"""Settings whose other words mean other tensors or other rows."""


def torchao_rules(settings: Fields) -> list[Rule]:
    """The rule. Raises ModelFormatError for what no reader here knows."""
    kinds = settings.get("quant_type")
    default = kinds.get("default") if isinstance(kinds, Mapping) and len(kinds) == 1 else None
    if not isinstance(default, Mapping) or not isinstance(default.get("_data", {}), Mapping):
        raise settings.error("quant_type", "must be an object with one key, default, and an object there")
    name = Fields(f"{settings.source}: quant_type.default", default).text("_type")
    if name not in (*_WEIGHTS, *_ROWS_TOO):
        raise settings.error("quant_type", f"{name!r} is not supported; known: {', '.join((*_WEIGHTS, *_ROWS_TOO))}")
    fields = Fields(f"{settings.source}: {name}", {str(key): value for key, value in default.get("_data", {}).items()})
    _refuse(fields)
    return [Rule(Pattern("", "all"), _scheme(fields, fp8=name.startswith("Float8"), rows_too=name in _ROWS_TOO))]


def _refuse(fields: Fields) -> None:
    for key in _REFUSED:
        if fields.get(key):
            raise fields.error(key, "is not supported")
    for key, known in _WORDS.items():
        value = fields.get(key)
        word = value.get("_data") if isinstance(value, Mapping) else value
        if word is not None and str(word).upper() != known:
            raise fields.error(key, f"{word!r} is not supported; known: {known}")


def _scheme(fields: Fields, *, fp8: bool, rows_too: bool) -> Scheme:
    value = fields.get("granularity")
    # FP8's rows share a scale with the whole batch unless something is said.
    of_rows, of_weights = value if isinstance(value, list) and len(value) == 2 else (value, value)
    silent = "PerTensor" if fp8 and rows_too else "PerRow"
    kind, sizes = _grain(fields, of_weights, silent)
    if kind not in ("PerRow", "PerAxis", "PerTensor", "PerGroup", "PerBlock"):
        raise fields.error("granularity", f"{kind!r} is not supported; known: PerRow, PerTensor, PerGroup, PerBlock")
    group = sizes.integer("group_size") if kind == "PerGroup" else fields.optional_integer("group_size")
    block = sizes.sides("block_size") if kind == "PerBlock" else None
    return Scheme(
        "plain",
        8,
        group=group,
        fp8=fp8,
        block=block,
        per_tensor=kind == "PerTensor" and group is None,
        activations=_activations(fields, of_rows, silent, fp8=fp8) if rows_too else None,
        codes_name="_weight_qdata",
        scale_name="_weight_scale",
        zeros_name="_weight_zero_point",
    )


def _activations(fields: Fields, value: object, silent: str, *, fp8: bool) -> Activations:
    kind, sizes = _grain(fields, value, silent)
    if kind not in ("PerRow", "PerBlock"):
        problem = f"{kind!r} of rows is not supported, since a row would depend on its batch; known: PerRow, PerBlock"
        raise fields.error("granularity", problem)
    sides = sizes.sides("block_size") if kind == "PerBlock" else None
    if sides is not None and sides[0] != 1:
        raise fields.error("granularity", f"blocks of {sides[0]} rows are not supported; known: 1")
    group = None if sides is None else sides[1]
    return Activations("fp8" if fp8 else "int8", dynamic=True, group=group, by_inverse=not fp8)


def _grain(fields: Fields, value: object, silent: str) -> tuple[str, Fields]:
    """Who shares a scale, and its sizes."""
    if value is None:
        return silent, Fields(f"{fields.source}: granularity", {})
    if not isinstance(value, Mapping) or not isinstance(value.get("_data", {}), Mapping):
        raise fields.error("granularity", "must be an object")
    sizes = {str(key): size for key, size in value.get("_data", {}).items()}
    return str(value.get("_type")), Fields(f"{fields.source}: granularity", sizes)
