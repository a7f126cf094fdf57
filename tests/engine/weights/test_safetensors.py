"""Hugging Face folders: tensors, shards, configs in two spellings, and every way a folder can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.weights import open_checkpoint, read_config
from tandem.errors import ModelFormatError

WriteFolder = Callable[..., Path]


def test_every_dtype(write_folder: WriteFolder) -> None:
    """float32 and bfloat16 as stored, float16 widened; other types only matter when they are read."""
    values = torch.linspace(-2, 2, 24).view(4, 6)
    folder = write_folder(
        tensors={"a": values, "b": values.bfloat16(), "c": values.half(), "d": values.long(), "e": torch.empty(0, 3)}
    )
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.tensor("a"), values)
    assert torch.equal(checkpoint.tensor("b"), values.bfloat16())
    assert torch.equal(checkpoint.tensor("c"), values.half().float())
    assert checkpoint.tensor("e").shape == (0, 3)
    assert checkpoint.shape("d") == (4, 6)
    with pytest.raises(ModelFormatError, match="type I64; supported: F32, F16, BF16"):
        checkpoint.tensor("d")
    with pytest.raises(ModelFormatError, match="tensor z is missing"):
        checkpoint.tensor("z")
    checkpoint.release("a")
    assert torch.equal(checkpoint.tensor("a"), values)


def test_a_head_of_its_own_wins_over_the_tie(write_folder: WriteFolder) -> None:
    """As in transformers 5: tied when the file has no head or the same one, whatever else config.json claims."""
    table = torch.arange(32.0 * 32).view(32, 32)
    for head, claim, tied in (
        (None, True, True),
        (table, True, True),
        (table.flip(0), True, False),
        (table.bfloat16(), True, False),
        (table, False, False),
    ):
        heads = {} if head is None else {"lm_head.weight": head.contiguous()}
        tensors = {"model.embed_tokens.weight": table.clone(), **{name: t.clone() for name, t in heads.items()}}
        folder = write_folder({"tie_word_embeddings": claim}, tensors)
        assert read_config(folder).tie_embeddings is tied


def _shard(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(write_folder: WriteFolder) -> None:
    """All files of the index are read; `files` names them for the identity."""
    folder = write_folder()
    save_file({"a": torch.ones(2)}, folder / "m-1.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "m-2.safetensors")
    _shard(folder, {"a": "m-1.safetensors", "b": "m-2.safetensors"})
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.names()) == ["a", "b"]
    assert [path.name for path in checkpoint.files] == ["config.json", "m-1.safetensors", "m-2.safetensors"]
    (folder / "m-2.safetensors").unlink()
    with pytest.raises(ModelFormatError, match=r"m-2\.safetensors: cannot be read"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "weights.bin"])
def test_shards_stay_in_the_folder(shard: str, write_folder: WriteFolder) -> None:
    """An index cannot point elsewhere, nor at pickle files."""
    folder = write_folder()
    _shard(folder, {"a": shard})
    with pytest.raises(ModelFormatError, match="not the name of a safetensors file"):
        open_checkpoint(folder)


def test_truncated_and_damaged(write_folder: WriteFolder) -> None:
    """A file cut or hit anywhere is refused."""
    folder = write_folder()
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 8, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFormatError, match=r"truncated|the file is empty"):
            open_checkpoint(folder)
    for content, message in (
        (whole + b"x", "damaged: its tensors end"),
        (b"\xff" * 64, "its header would have"),
        ((10).to_bytes(8, "little") + b"not json!!", "not a safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
        (whole.replace(b"[32]", b"[33]"), "do not hold F32"),
        (whole.replace(b"[0,128]", b"[9,128]"), "do not hold F32"),
        (whole.replace(b"[0,128]", b"[9,1  ]"), "entry 'model.norm.weight'"),
        (whole.replace(b"[32]", b"[-2]"), "entry 'model.norm.weight'"),
    ):
        assert content != whole
        path.write_bytes(content)
        with pytest.raises(ModelFormatError, match=message):
            open_checkpoint(folder)


def test_folders_that_are_no_models(tmp_path: Path, write_folder: WriteFolder) -> None:
    """The message says what is missing."""

    def refused(names: list[str], message: str) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
        with pytest.raises(ModelFormatError, match=message):
            open_checkpoint(folder)

    refused([], r"not a model: no config\.json and no model\.safetensors")
    refused(["tokenizer.json", "tokenizer_config.json"], "holds a tokenizer but no weights")
    refused(["config.json", "tokenizer.json"], "holds a tokenizer but no weights")
    refused(["config.json"], "has config.json but no weights")
    refused(["config.json", "pytorch_model.bin"], "pickle files can run code and are never loaded")
    refused(["model.safetensors"], r"config\.json is missing")
    refused(["a.gguf"], r"give the file's path, such as .*a\.gguf")
    with pytest.raises(ModelFormatError, match="give the folder"):
        open_checkpoint(write_folder() / "model.safetensors")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model_type": "mamba"}, r"unknown architecture 'mamba'; known: llama, mistral, qwen2, qwen3"),
        ({"model_type": ...}, "model_type: is missing"),
        ({"hidden_size": "wide"}, "hidden_size: must be an integer between 1 and"),
        ({"num_hidden_layers": ...}, "num_hidden_layers: is missing"),
        ({"num_key_value_heads": 3}, "4 heads do not divide by 3 KV heads"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: must be over 0"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: bits: is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "known: default, linear, llama3, yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor: is missing"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "settings per layer"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: must be true or false"),
        ({"eos_token_id": [2, -1]}, "eos_token_id: must be a token id"),
        ({"eos_token_id": 32}, "end token 32 is outside the vocabulary"),
        ({"head_dim": 12}, "heads of 12 are not supported"),
        ({"num_attention_heads": 64, "num_key_value_heads": 64}, "heads of 0 are not supported"),
        ({"rope_theta": 10**400}, "rope_theta: must be a number"),
        ({"rope_theta": 1.0}, r"RoPE base of 1\.0"),
        ({"partial_rotary_factor": -0.5}, "partial_rotary_factor: must be over 0 and at most 1"),
        ({"partial_rotary_factor": 1e29}, "partial_rotary_factor: must be over 0 and at most 1"),
        ({"partial_rotary_factor": 0.01}, "0 rotary elements do not fit"),
        ({"max_position_embeddings": 1 << 30}, "a context of 1073741824 tokens; at most 16777216"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e29}}, "a context of .* tokens; at most 16777216"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic' is not supported"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": [["full_attention"]] * 4},
            "layer_types: must be a list of 4",
        ),
    ],
)
def test_bad_configs(overrides: dict[str, Any], message: str, write_folder: WriteFolder) -> None:
    """Each names its key and what is allowed."""
    with pytest.raises(ModelFormatError, match=message):
        read_config(write_folder(overrides))


def test_bad_json(write_folder: WriteFolder) -> None:
    """Not JSON, not an object, nested without end."""
    folder = write_folder()
    for text, message in (
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("[" * 100_000, "not valid JSON"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelFormatError, match=message):
            read_config(folder)


def test_windows(write_folder: WriteFolder) -> None:
    """Mistral: all layers; Qwen: from max_window_layers on, or as layer_types says, when it is switched on."""
    assert read_config(write_folder({"sliding_window": 8})).sliding_window is None
    assert read_config(write_folder({"model_type": "mistral"})).sliding_window == 4096
    assert read_config(write_folder({"model_type": "mistral", "sliding_window": None})).sliding_window is None
    for kind in ("qwen2", "qwen3"):
        switched_on = {"model_type": kind, "use_sliding_window": True, "max_window_layers": 2}
        assert read_config(write_folder(switched_on)).sliding_window == 4096
        assert read_config(write_folder({**switched_on, "sliding_window": None})).sliding_window is None
    qwen = {"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 3}
    assert read_config(write_folder(qwen)).sliding_window is None
    config = read_config(write_folder({**qwen, "use_sliding_window": True}))
    assert [config.layer_window(i) for i in range(4)] == [None, None, None, 8]
    types = ["sliding_attention", "full_attention"] * 2
    config = read_config(write_folder({**qwen, "use_sliding_window": True, "layer_types": types}))
    assert [config.layer_window(i) for i in range(4)] == [8, None, 8, None]


def test_rope_spellings(write_folder: WriteFolder) -> None:
    """transformers 4 and 5 write the same settings in two ways; yarn raises the context."""
    settings = {"factor": 4.0, "original_max_position_embeddings": 64}
    old = read_config(write_folder({"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **settings}}))
    new = read_config(write_folder({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **settings}}))
    assert old == new
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    assert read_config(write_folder({"rope_scaling": {}, "rope_parameters": linear})).rope.theta == 7.0
    both = read_config(write_folder({"rope_scaling": {"type": "yarn", **settings}, "rope_parameters": linear}))
    assert both.rope.kind == "yarn"
    assert (old.rope.kind, old.rope.theta, old.rope.factor, old.max_context) == ("yarn", 5e5, 4.0, 256)


def test_end_tokens_of_both_files(write_folder: WriteFolder) -> None:
    """generation_config.json adds the end of turn."""
    folder = write_folder({"eos_token_id": 2})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert read_config(folder).eos_token_ids == (2, 7)
