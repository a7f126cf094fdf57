"""The `config_groups` of compressed-tensors (what llm-compressor writes) as rules.

A layer is of the group whose target names it best: by its own name, by a regular expression ("re:..."), by its class
("Linear"). Of several expressions the first by the alphabet counts, whichever group it is of, and of several groups
with one target the last: so the tool does it. Names and expressions of `ignore` leave layers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from engine.weights.fields import Fields
from engine.weights.quantized import BITS, Activations, Packing, Pattern, Rule, Scheme

_PACKINGS: Final[Mapping[str, Packing]] = {
    "pack-quantized": "packed",
    "int-quantized": "plain",
    "float-quantized": "plain",
    "naive-quantized": "plain",
}
_KV_DTYPES: Final = {"float": "float8_e4m3", "int": "int8"}
_RANK: Final = {"name": 0, "match": 1, "all": 2}


def compressed_rules(settings: Fields) -> list[Rule]:
    """Rules, the exact ones first. Raises ModelFormatError for what no reader here knows."""
    # What the older tool compressed while it was saved stayed "frozen" by name.
    status = settings.text("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise settings.error("quantization_status", f"must be compressed or frozen, not {status!r}")
    _check_dense(settings)
    ignored = [Rule(_pattern(settings, "ignore", text), None) for text in _texts(settings, "ignore")]
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise settings.error("config_groups", "must be an object that is not empty")
    rules = [rule for name, group in groups.items() for rule in _group_rules(settings, str(name), group)]
    last = {rule.pattern: rule for rule in rules}.values()
    return [*ignored, *sorted(last, key=lambda rule: (_RANK[rule.pattern.kind], rule.pattern.text))]


def _check_dense(settings: Fields) -> None:
    """Accept a `sparsity_config` that only notes how many weights happen to be 0, as older checkpoints have it."""
    sparsity = settings.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        raise settings.error("sparsity_config", "is not supported, but for format 'dense'")
    if settings.get("transform_config"):
        raise settings.error("transform_config", "is not supported")


def kv_scales_dtype(settings: Fields) -> str:
    """The type of a cache that each layer has a scale of keys and one of values for; empty: layers have none.

    Dynamic schemes have none: a cache of 8 bits finds its own. Raises ModelFormatError for a `kv_cache_scheme` that
    isn't read.
    """
    value = settings.get("kv_cache_scheme")
    if value is None:
        return ""
    if not isinstance(value, Mapping):
        raise settings.error("kv_cache_scheme", "must be an object")
    fields = Fields(f"{settings.source}: kv_cache_scheme", value)
    kind = _KV_DTYPES.get(fields.text("type", "int").lower())
    if kind is None or fields.integer("num_bits", 8) != 8 or not fields.boolean("symmetric", True):
        raise settings.error("kv_cache_scheme", "is supported as symmetric float 8 or int 8 only")
    if fields.boolean("dynamic", False):
        return ""
    if fields.text("strategy", "tensor") != "tensor":
        raise settings.error("kv_cache_scheme", "is supported with strategy 'tensor' only, unless it is dynamic")
    return kind


def _group_rules(settings: Fields, name: str, group: object) -> list[Rule]:
    if not isinstance(group, Mapping):
        raise settings.error(f"config_groups.{name}", "must be an object")
    fields = Fields(f"{settings.source}: config_groups.{name}", group)
    if group.get("output_activations") is not None:
        raise fields.error("output_activations", "is not supported")
    form = fields.text("format", settings.text("format"))
    if form not in _PACKINGS:
        raise fields.error("format", f"{form!r} is not supported; known: {', '.join(_PACKINGS)}")
    scheme = _weights(fields, _PACKINGS[form])
    return [Rule(_pattern(fields, "targets", text), scheme) for text in _texts(fields, "targets")]


def _weights(group: Fields, packing: Packing) -> Scheme:
    value = group.get("weights")
    if not isinstance(value, Mapping):
        raise group.error("weights", "must be an object")
    fields = Fields(f"{group.source}: weights", value)
    kind, bits = fields.text("type", "int").lower(), fields.integer("num_bits", 8)
    if bits not in BITS or (kind, bits) not in (("float", 8), *(("int", b) for b in BITS)):
        known = "int " + ", ".join(map(str, BITS)) + ", float 8"
        raise fields.error("num_bits", f"{kind} {bits} is not supported; known: {known}")
    if packing == "packed" and kind != "int":
        raise fields.error("type", f"{kind!r} can't be packed")
    if kind == "float" and not fields.boolean("symmetric", True):
        raise fields.error("symmetric", "must be true with type 'float'")
    strategy = fields.text("strategy", _strategy_by_group(fields))
    if strategy not in ("tensor", "channel", "group", "block"):
        raise fields.error("strategy", f"{strategy!r} is not supported; known: tensor, channel, group, block")
    return Scheme(
        packing,
        bits if packing == "packed" else 8,
        group=fields.integer("group_size") if strategy == "group" else None,
        fp8=kind == "float",
        symmetric=fields.boolean("symmetric", True),
        block=_block(fields) if strategy == "block" else None,
        per_tensor=strategy == "tensor",
        ordered=fields.get("actorder") in ("group", "dynamic"),
        activations=_activations(group),
    )


def _strategy_by_group(fields: Fields) -> str:
    group = fields.get("group_size")
    return "tensor" if group is None else "channel" if group == -1 else "group"


def _activations(group: Fields) -> Activations | None:
    value = group.get("input_activations")
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise group.error("input_activations", "must be an object")
    fields = Fields(f"{group.source}: input_activations", value)
    if fields.integer("num_bits", 8) != 8 or not fields.boolean("symmetric", True):
        raise fields.error("num_bits", "only symmetric activations of 8 bits are supported")
    kind: Literal["int8", "fp8"] = "fp8" if fields.text("type", "int").lower() == "float" else "int8"
    strategy, dynamic = fields.text("strategy", "tensor"), fields.boolean("dynamic", False)
    if (strategy, dynamic) == ("token", True):
        return Activations(kind, True)
    if (strategy, dynamic) == ("group", True):
        return Activations(kind, True, fields.integer("group_size"))
    if (strategy, dynamic) == ("tensor", False):
        return Activations(kind, False)
    # One scale for all rows of a step would make a row's result depend on the others.
    raise fields.error(
        "strategy", f"{strategy} with dynamic {dynamic} is not supported; known: dynamic token or group, static tensor"
    )


def _block(fields: Fields) -> tuple[int, int]:
    sides = fields.sides("block_structure")
    if sides is None:
        raise fields.error("block_structure", "is missing")
    return sides


def _pattern(settings: Fields, key: str, text: str) -> Pattern:
    if text.startswith("re:"):
        return Pattern(settings.expression(key, text.removeprefix("re:")), "match")
    return Pattern(text, "all") if text == "Linear" else Pattern(text, "name")


def _texts(settings: Fields, key: str) -> list[str]:
    value = settings.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise settings.error(key, "must be a list of strings")
    return value
