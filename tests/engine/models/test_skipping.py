"""A model with layers skipped is the model that a checkpoint without them would give, over weights it doesn't own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.models.skipping import KeptCache, keep_layers, parse_layers
from tandem.errors import ConfigError, InternalError

PROMPTS = [list(range(3, 40)), list(range(100, 123))]
COMPUTES = ("exact", "int8")


def without_layers(folder: Path, kept: Sequence[int]) -> Path:
    """A copy of a checkpoint that has only the layers `kept`."""
    out = folder.parent / "kept"
    out.mkdir()
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if match is None:
            tensors[name] = tensor
        elif int(match[1]) in kept:
            tensors[f"model.layers.{kept.index(int(match[1]))}.{match[2]}"] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = len(kept)
    config.pop("layer_types", None)
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("kept", [(0, 2), (1, 2), (1,)])
def test_as_a_checkpoint_without_the_other_layers(
    kept: tuple[int, ...],
    compute: str,
    save_tiny: Callable[..., tuple[Path, Any]],
    make_driver: Callable[..., Any],
    make_cache: Callable[..., Any],
    cpp_kernels: None,
) -> None:
    folder, _ = save_tiny("llama", intermediate_size=96)
    whole = make_driver(folder, sequences=2, compute=compute)
    small = make_driver(without_layers(folder, kept), sequences=2, compute=compute)
    cache = make_cache(whole.model.config, whole.engine)
    skipping = replace(whole, model=keep_layers(whole.model, kept))
    untouched = cache.tensor.clone()
    assert skipping.model.config == replace(small.model.config, name=whole.model.config.name)
    got = skipping.run(PROMPTS, 16, KeptCache(cache, kept))
    for left, right in zip(got, small.run(PROMPTS, 16), strict=True):
        assert torch.equal(left, right)
    for layer in set(range(3)) - set(kept):
        assert torch.equal(cache.layer(layer), untouched[:, layer])


@pytest.mark.parametrize("compute", COMPUTES)
def test_layers_before_the_first_skipped_one_cache_the_same(
    compute: str,
    save_tiny: Callable[..., tuple[Path, Any]],
    make_driver: Callable[..., Any],
    make_cache: Callable[..., Any],
    cpp_kernels: None,
) -> None:
    folder, _ = save_tiny("llama", intermediate_size=96)
    whole = make_driver(folder, sequences=2, compute=compute)
    caches = [make_cache(whole.model.config, whole.engine) for _ in range(2)]
    whole.run(PROMPTS, 16, caches[0])
    replace(whole, model=keep_layers(whole.model, (0, 1))).run(PROMPTS, 16, KeptCache(caches[1], (0, 1)))
    for layer in (0, 1):
        assert torch.equal(caches[0].layer(layer), caches[1].layer(layer))
    assert not torch.equal(caches[0].layer(2), caches[1].layer(2))


def test_a_cache_with_too_few_layers_is_refused(
    save_tiny: Callable[..., tuple[Path, Any]], make_driver: Callable[..., Any], make_cache: Callable[..., Any]
) -> None:
    folder, _ = save_tiny("llama", intermediate_size=96)
    whole = make_driver(folder, compute="int8")
    model = keep_layers(whole.model, (0, 2))
    with pytest.raises(InternalError, match="too small for layer 2"):
        replace(whole, model=model).run([[1, 2]], 2, make_cache(model.config, whole.engine))


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("1", (0,)),
        ("2", (0, 29)),
        ("4", (0, 10, 19, 29)),
        ("0-3,7,28-29", (0, 1, 2, 3, 7, 28, 29)),
        ("5, 2", (2, 5)),
    ],
)
def test_layers_to_keep(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 30, flag="--self-draft-layers") == layers


@pytest.mark.parametrize("text", ["0", "30", "99", "0-29", "30,2", "", "a", "3-", "-1", "5-2"])
def test_layers_that_cannot_be_kept(text: str) -> None:
    with pytest.raises(ConfigError, match="--self-draft-layers"):
        parse_layers(text, 30, flag="--self-draft-layers")
