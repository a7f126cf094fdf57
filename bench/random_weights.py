"""Models of a named shape with random weights: without any file, made where they are used, tensor by tensor; or, for
what takes files alone, as a Hugging Face folder with a tokenizer of bytes:

    python -m bench.random_weights llama-3-8b FOLDER --device cuda
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from engine.config import ModelConfig, RopeConfig
from engine.weights.checkpoint import StoredTensor
from kernels.coded import CodedWeights
from kernels.int8 import GroupWeights
from tandem.errors import ConfigError, ModelFormatError

PREFIX: Final = "random:"
SPREAD: Final = 0.02
"""Standard deviation of weights, as models are initialised: activations stay finite through all layers."""


def _llama(
    name: str,
    layers: int,
    width: int,
    inner: int,
    heads: tuple[int, int],
    *,
    vocabulary: int = 128_256,
    theta: float = 500_000.0,
    max_context: int = 8192,
) -> ModelConfig:
    """`heads`: of queries, and of keys and values."""
    return ModelConfig(
        architecture="llama",
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=width // heads[0],
        intermediate_size=inner,
        rms_eps=1e-5,
        rope=RopeConfig(theta=theta, rotary_dim=width // heads[0]),
        max_context=max_context,
        name=name,
    )


SHAPES: Final = {
    shape.name: shape
    for shape in (
        _llama("smol-135m", 30, 576, 1536, (9, 3), vocabulary=49_152, theta=100_000.0, max_context=2048),
        _llama("llama-1b", 16, 2048, 8192, (32, 8)),
        _llama("llama-3-8b", 32, 4096, 14_336, (32, 8)),
        _llama("llama-3-8b-32k", 32, 4096, 14_336, (32, 8), max_context=33_024),
        _llama("llama-3-70b", 80, 8192, 28_672, (64, 8)),
        _llama("llama-tiny", 2, 64, 96, (4, 2), vocabulary=500, theta=10_000.0, max_context=256),
    )
}


def open_random(model: str, device: str) -> RandomCheckpoint | None:
    """The checkpoint that "random:SHAPE" names; None for any other name. Raises ConfigError for an unknown shape."""
    return RandomCheckpoint(model.removeprefix(PREFIX), device) if model.startswith(PREFIX) else None


class RandomCheckpoint:
    """A `Checkpoint` of random weights on `device`."""

    files: Sequence[Path] = ()
    coding = ""
    kv_scales = ""

    def __init__(self, shape: str, device: str) -> None:
        """`shape` is one of SHAPES. Raises ConfigError for another."""
        if shape not in SHAPES:
            raise ConfigError(f"model: unknown shape {shape!r}; known: {', '.join(SHAPES)}")
        self.config = SHAPES[shape]
        self._device = device
        self._shapes = _tensor_shapes(self.config)
        self._generator = torch.Generator(device)

    def names(self) -> Sequence[str]:
        """See `Checkpoint`."""
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        if name not in self._shapes:
            raise ModelFormatError(f"no tensor {name}")
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        """Norms are 1, all else is normal with SPREAD."""
        shape = self.shape(name)
        if len(shape) == 1:
            return torch.ones(shape, device=self._device)
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        self._generator.manual_seed(zlib.crc32(name.encode()))  # the same whatever is read before
        return tensor.normal_(0.0, SPREAD, generator=self._generator)

    def coded(self, name: str) -> CodedWeights | None:
        """None: nothing is quantised."""
        return None

    def codes(self, name: str) -> GroupWeights | None:
        """None: nothing is quantised."""
        return None

    def release(self, name: str) -> None:
        """Nothing is held."""

    def stored(self) -> Iterator[StoredTensor]:
        """Nothing: random weights are identified by their shape."""
        return iter(())

    def close(self) -> None:
        """Nothing is open."""


def _tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (query, width),
        "self_attn.k_proj": (key, width),
        "self_attn.v_proj": (key, width),
        "self_attn.o_proj": (width, query),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(config.num_layers)
        for name, shape in layer.items()
    }
    table = (config.vocab_size, width)
    return {**shapes, "model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (width,)}


SHARD_BYTES: Final = 1 << 30
"""Written at once, and so much of the host's memory is needed for it."""


def write_folder(shape: str, folder: Path, device: str) -> None:
    """Write the model of `shape` to `folder`, which may be there. Raises ConfigError for an unknown shape."""
    from safetensors.torch import save_file

    checkpoint = RandomCheckpoint(shape, device)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    names = checkpoint.names()
    for name in names:
        shard[name] = checkpoint.tensor(name).to("cpu", torch.bfloat16)
        if name == names[-1] or sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            file = f"model-{len(set(files.values())):05d}.safetensors"
            save_file(shard, folder / file)
            files |= dict.fromkeys(shard, file)
            shard = {}
    _write_json(folder / "model.safetensors.index.json", {"weight_map": files})
    _write_json(folder / "config.json", hf_config(checkpoint.config))
    _write_json(folder / "tokenizer.json", _tokenizer())


def hf_config(config: ModelConfig) -> dict[str, object]:
    """`config` as transformers has it."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.max_context,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _tokenizer() -> dict[str, object]:
    """Byte-level BPE without a merge: a token a byte. Other ids have no text."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {text: index for index, text in enumerate(alphabet)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "fuse_unk": False, "byte_fallback": False}
    return {"version": "1.0", "added_tokens": [], "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.random_weights", description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where weights are drawn; they differ")
    arguments = parser.parse_args()
    write_folder(arguments.shape, arguments.folder, arguments.device)


if __name__ == "__main__":
    main()
