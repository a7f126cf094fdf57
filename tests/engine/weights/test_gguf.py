"""GGUF files: every type against the gguf package's own reader, and every way a file can be wrong."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.models.loader import load_model
from engine.weights import gguf_header, open_checkpoint, read_config
from tandem.errors import ModelFormatError

WriteGguf = Callable[..., Path]
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 8, 4, 32, 256


def _reference(path: Path) -> dict[str, np.ndarray]:
    """Every tensor by the gguf package's reader."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(t.shape)[::-1]).copy()
        for t in gguf.GGUFReader(path).tensors
    }


def _permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to q and k."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type(kind: str, write_gguf: WriteGguf) -> None:
    """Equal to the package's dequantisation bit for bit, q and k back in Hugging Face's order."""
    path = write_gguf(kind)
    expected = _reference(path)
    checkpoint = open_checkpoint(path)
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
    ):
        tensor = checkpoint.tensor(ours)
        assert tensor.dtype is (torch.bfloat16 if kind == "BF16" else torch.float32)
        assert np.array_equal(tensor.float().numpy(), expected[theirs])
    for part, heads in (("q", HEADS), ("k", KV_HEADS)):
        rows = checkpoint.tensor(f"model.layers.0.self_attn.{part}_proj.weight").float().numpy()
        assert np.array_equal(_permuted(rows, heads), expected[f"blk.0.attn_{part}.weight"])
        assert not np.array_equal(rows, expected[f"blk.0.attn_{part}.weight"])
    assert checkpoint.config.quantization == kind
    checkpoint.close()


@pytest.mark.parametrize("kind", TYPES)
def test_codes_are_the_tensor(kind: str, write_gguf: WriteGguf) -> None:
    """What int8 products take as it is, in exact numbers: only the rounding of a product and a sum differs."""
    checkpoint = open_checkpoint(write_gguf(kind))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        codes = checkpoint.codes(name)
        assert (codes is not None) == (kind in ("Q4_0", "Q4_1", "Q8_0"))
        if codes is not None:
            torch.testing.assert_close(codes.dequantized(), checkpoint.tensor(name), rtol=0, atol=2e-6)
        coded = checkpoint.coded(name)
        assert (coded is None) == (codes is None)
        if coded is not None:
            assert torch.equal(coded.dequantized(), checkpoint.tensor(name))
    assert checkpoint.codes("model.norm.weight") is None
    assert checkpoint.coded("model.norm.weight") is None
    checkpoint.close()


@pytest.mark.parametrize("kind", ["F32", "Q4_K"])
def test_loads_into_a_model(kind: str, write_gguf: WriteGguf) -> None:
    """The whole file is used, and nothing of the model lives in the map."""
    path = write_gguf(kind, tied=True)
    checkpoint = open_checkpoint(path)
    model = load_model(checkpoint, EngineConfig(model=str(path)))
    table = checkpoint.tensor("model.embed_tokens.weight").clone()
    checkpoint.close()
    path.write_bytes(b"\xff" * path.stat().st_size)
    ids = torch.tensor([0, 1, 62, 63])
    assert torch.equal(model.embedding(ids), table[ids])
    assert model.config.tie_embeddings
    assert model.embedding.nbytes == 0


def test_reading_again_after_release(write_gguf: WriteGguf) -> None:
    """Dropped pages come back from the file."""
    checkpoint = open_checkpoint(write_gguf("F32"))
    name = "model.layers.0.mlp.up_proj.weight"
    first = checkpoint.tensor(name).clone()
    checkpoint.release(name)
    assert torch.equal(checkpoint.tensor(name), first)


def test_qwen2_has_biases_and_keeps_its_order(write_gguf: WriteGguf) -> None:
    """Other architectures than Llama are not permuted; biases are noticed by their tensors."""
    bias = {
        f"blk.{i}.attn_{part}.bias": np.arange(n, dtype=np.float32)
        for i in (0, 1)
        for part, n in (("q", HIDDEN), ("k", 128), ("v", 128))
    }
    path = write_gguf("Q8_0", architecture="qwen2", tensors=bias)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.attention_bias
    assert not checkpoint.config.attention_output_bias
    rows = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight").numpy()
    assert np.array_equal(rows, _reference(path)["blk.0.attn_q.weight"])
    model = load_model(checkpoint, EngineConfig(model=str(path)))
    assert model.layers[1].qkv.bias is not None
    assert model.layers[1].qkv.bias.tolist() == [*range(256), *range(128), *range(128)]


def test_llama_biases_are_permuted_too(write_gguf: WriteGguf) -> None:
    """The converter reorders the biases of q and k like the rows."""
    original = np.arange(HIDDEN, dtype=np.float32)
    path = write_gguf(tensors={"blk.0.attn_q.bias": _permuted(original, HEADS)})
    bias = open_checkpoint(path).tensor("model.layers.0.self_attn.q_proj.bias")
    assert np.array_equal(bias.numpy(), original)


def test_config_fields(write_gguf: WriteGguf) -> None:
    """Metadata becomes the model's shape."""
    fields = {
        "llama.rope.freq_base": 50000.0,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
        "llama.attention.sliding_window": 64,
        "llama.attention.sliding_window_pattern": [True, False],
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.bos_token_id": 1,
        "general.name": "tiny",
    }
    config = read_config(write_gguf(fields=fields, tensors={"rope_freqs.weight": np.full(16, 2.0, np.float32)}))
    assert (config.architecture, config.name) == ("llama", "tiny")
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (64, HIDDEN, 512)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, HEADS, KV_HEADS, HEAD_DIM)
    assert config.rms_eps == pytest.approx(1e-5)
    assert (config.rope.theta, config.rope.kind, config.rope.factor) == (50000.0, "yarn", 4.0)
    assert config.rope.original_max_context == 32
    assert config.rope.frequency_factors == (2.0,) * 16
    assert config.max_context == 128
    assert [config.layer_window(i) for i in (0, 1)] == [64, None]
    assert config.eos_token_ids == (2, 7)
    assert config.bos_token_id == 1
    assert not config.tie_embeddings


def test_truncated_anywhere(write_gguf: WriteGguf, tmp_path: Path) -> None:
    """Cut at any place the file is refused with a word about it, never read past its end."""
    whole = write_gguf("Q8_0").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 4, 8, 20, 24, 100, 1000, 70_000, len(whole) // 2, len(whole) - 40):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelFormatError, match=r"cut\.gguf: (truncated|the file is empty|not a)"):
            open_checkpoint(cut)


def test_damaged_headers(write_gguf: WriteGguf, tmp_path: Path) -> None:
    """A header whose bytes are hit anywhere is read, or refused as a ModelFormatError: nothing else comes out."""
    whole = bytearray(write_gguf("Q8_0", fields={"general.alignment": 32}).read_bytes())
    random = np.random.default_rng(0)
    path = tmp_path / "hit.gguf"
    refused = 0
    for _ in range(150):
        hit = bytearray(whole)
        # Header fields lie before the long token list and after it.
        for at in [*random.integers(0, 400, 2), *random.integers(80_000, 84_000, 2)]:
            hit[at] = random.integers(0, 256)
        path.write_bytes(hit)
        try:
            open_checkpoint(path).close()
        except ModelFormatError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "gptneox"}, r"unknown architecture 'gptneox'; known in GGUF files: llama, qwen2, qwen3"),
        ({"kind": "TQ1_0"}, r"has type TQ1_0; supported: F32, F16, BF16, Q4_0, .*Q6_K"),
        ({"fields": {"llama.expert_count": 8}}, r"llama\.expert_count: mixtures of experts"),
        ({"fields": {"llama.rope.scaling.type": "longrope"}}, r"longrope.*known: linear, none, yarn"),
        ({"fields": {"split.count": 3}}, "one of 3 parts"),
        ({"fields": {"llama.attention.key_length": 36, "llama.attention.value_length": 36}}, "heads of 36"),
        ({"fields": {"llama.attention.value_length": 16}}, "must equal the key length"),
        ({"fields": {"general.alignment": 33}}, r"general\.alignment"),
        ({"tensors": {"rope_freqs.weight": np.ones(1000, np.float32)}}, r"impossible shape \(1000,\)"),
        ({"tensors": {"rope_freqs.weight": np.zeros(16, np.float32)}}, "RoPE factors must be over 0"),
        ({"tensors": {"rope_freqs.weight": np.full(16, np.nan, np.float32)}}, "RoPE factors must be over 0"),
        ({"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}, "8 RoPE factors for 32 elements"),
        (
            {"tensors": {"model.norm.weight": np.ones(HIDDEN, np.float32)}},
            r"tensors output_norm\.weight and model\.norm\.weight are the same one",
        ),
        ({"drop": ("token_embd.weight",)}, r"token_embd\.weight is missing"),
        ({"fields": {"tokenizer.ggml.eot_token_id": 64}}, "end token 64 is outside the vocabulary of 64"),
    ],
)
def test_unusable_files(arguments: dict[str, object], message: str, write_gguf: WriteGguf) -> None:
    """Refused when opened, with a message that says why."""
    with pytest.raises(ModelFormatError, match=message):
        open_checkpoint(write_gguf(**arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop": ("blk.1.ffn_up.weight",)}, r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"),
        ({"tensors": {"blk.0.ffn_gate.weight": np.zeros((512, 32), np.float32)}}, r"has shape \(512, 32\); expected"),
        (
            {"tensors": {"blk.0.attn_sinks.weight": np.zeros(8, np.float32)}},
            r"llama has no use for tensor blk\.0\.attn_si",
        ),
    ],
)
def test_unloadable_files(arguments: dict[str, object], message: str, write_gguf: WriteGguf) -> None:
    """Refused by the loader: tensors that are missing, misshapen or of another network; torch's threads stay as set."""
    path = write_gguf(**arguments)
    threads = torch.get_num_threads()
    with pytest.raises(ModelFormatError, match=message):
        load_model(open_checkpoint(path), EngineConfig(model=str(path)))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("rope_freqs.weight", (0,)),
        ("rope_freqs.weight", (0, 1 << 63)),
        ("token_embd.weight", (HIDDEN, 0)),
        ("token_embd.weight", (0, 1 << 63)),
    ],
)
def test_tensors_of_no_elements(name: str, sides: tuple[int, ...], write_gguf: WriteGguf) -> None:
    """They fit any file, whatever they claim to be along another side. `sides` are innermost first, as in the file."""
    path = write_gguf(tensors={"rope_freqs.weight": np.ones(16, np.float32)})
    whole = path.read_bytes()
    at = whole.index(name.encode()) + len(name)
    (count,) = struct.unpack_from("<I", whole, at)
    path.write_bytes(whole[:at] + struct.pack(f"<I{len(sides)}Q", len(sides), *sides) + whole[at + 4 + 8 * count :])
    with pytest.raises(ModelFormatError, match=r"impossible shape|a vocabulary of"):
        open_checkpoint(path)


def test_header_is_bounded(write_gguf: WriteGguf, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the file: this process reads and keeps only so much of it."""
    path = write_gguf()
    open_checkpoint(path).close()
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(ModelFormatError, match="a header of over 1000 bytes"):
        open_checkpoint(path)


def test_not_gguf(tmp_path: Path) -> None:
    """Another file, no file, another version."""
    path = tmp_path / "x.gguf"
    with pytest.raises(ModelFormatError, match="no such file"):
        open_checkpoint(path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFormatError, match="neither a file nor a folder"):
        open_checkpoint(tmp_path / "pipe.gguf")
    path.write_text("hello, I am a text file")
    with pytest.raises(ModelFormatError, match="not a GGUF file"):
        open_checkpoint(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ModelFormatError, match="version 1 is not supported; known: 2, 3"):
        open_checkpoint(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0))
    with pytest.raises(ModelFormatError, match="not a valid GGUF file"):
        open_checkpoint(path)
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"x")
    with pytest.raises(ModelFormatError, match="pickle files can run code"):
        open_checkpoint(pickle)
