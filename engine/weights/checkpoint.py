"""What a model file offers to the loader, whatever its format, and how to open one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from torch import Tensor

from engine.config import ModelConfig, RopeConfig
from engine.weights.fields import MAX_SIZE
from kernels.coded import CodedWeights
from kernels.int8 import GroupWeights
from tandem.errors import ModelFormatError

MAX_HEAD_DIM: Final = 256
HEAD_DIM_STEP: Final = 8
MAX_CONTEXT: Final = 1 << 24
"""Tokens. RoPE tables grow with the context, so a file must not ask for any number."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor exactly as the file holds it; `data` is a window onto the map."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: memoryview


class Checkpoint(Protocol):
    """An open model file. Tensors have Hugging Face names: `model.layers.0.self_attn.q_proj.weight` and so on.

    Life cycle: `open_checkpoint` maps the files and checks their headers; `tensor` reads one tensor, `release` gives
    its source pages back; `close` unmaps. All but `close` may be called from several threads.
    """

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    @property
    def files(self) -> Sequence[Path]:
        """Every file that the model is read from."""

    @property
    def coding(self) -> str:
        """What the stored bytes mean where their types don't say: part of the model's identity. Mostly empty."""

    @property
    def kv_scales(self) -> str:
        """The cache's type that scales of keys and values are for, where layers have such (`k_scale`, `v_scale`)."""

    def names(self) -> Sequence[str]:
        """All tensors, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, outermost first. Raises ModelFormatError when there is no such tensor."""

    def tensor(self, name: str) -> Tensor:
        """The tensor as float32, or as bfloat16 when the file holds that; perhaps a view of the map: never write to it.

        Raises ModelFormatError when it is missing or of a type that is not supported.
        """

    def coded(self, name: str) -> CodedWeights | None:
        """The matrix as the codes that the file holds, for `kernels.coded`; None where it is plain numbers."""

    def codes(self, name: str) -> GroupWeights | None:
        """The matrix as the codes that the file holds; None when its type has none that `kernels.int8` takes."""

    def release(self, name: str) -> None:
        """Give back the memory of the tensor's source pages; it may still be read again."""

    def stored(self) -> Iterator[StoredTensor]:
        """Every tensor as the file holds it, in order of name: what `model_id` digests."""

    def close(self) -> None:
        """Unmap the files. Views that still live keep their map."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file or a Hugging Face safetensors folder.

    Raises ModelFormatError: missing, truncated, not a model, of an unknown architecture or type.
    """
    # Late imports: the two formats import this module for the protocol.
    from engine.weights.folder import open_folder
    from engine.weights.gguf import GgufCheckpoint

    where = Path(path).expanduser()
    if where.is_dir():
        return open_folder(where)
    if not where.exists():
        raise ModelFormatError(f"{where}: no such file or folder")
    if not where.is_file():
        raise ModelFormatError(f"{where}: neither a file nor a folder")
    if where.suffix == ".safetensors":
        raise ModelFormatError(f"{where}: give the folder that holds it, with its config.json")
    if where.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}:
        raise ModelFormatError(f"{where}: {PICKLE_REFUSED}")
    return GgufCheckpoint(where)


PICKLE_REFUSED: Final = "pickle files can run code and are never loaded; convert the model to safetensors or GGUF"


KV_SCALES: Final = ("{}.{}_scale", "{}.{}_proj.output_scale")
"""Names of an attention layer's scales of keys (k) and values (v): as tools write them, and as they did until 2024."""


def kv_scale_names(attention: str, names: Collection[str]) -> list[str]:
    """Keys' and values', in the spelling of which any is in `names`; the first one without."""
    spelled = [[form.format(attention, part) for part in ("k", "v")] for form in KV_SCALES]
    return next((pair for pair in spelled if any(name in names for name in pair)), spelled[0])


def read_config(path: str | Path) -> ModelConfig:
    """The shape of the model at `path`, without reading its weights. Raises ModelFormatError as `open_checkpoint`."""
    checkpoint = open_checkpoint(path)
    try:
        return checkpoint.config
    finally:
        checkpoint.close()


def check_config(config: ModelConfig, source: Path) -> ModelConfig:
    """Return `config` when the engine can run it. Raises ModelFormatError saying what it cannot."""
    if config.num_heads % config.num_kv_heads:
        raise ModelFormatError(f"{source}: {config.num_heads} heads do not divide by {config.num_kv_heads} KV heads")
    if config.head_dim % HEAD_DIM_STEP or not HEAD_DIM_STEP <= config.head_dim <= MAX_HEAD_DIM:
        raise ModelFormatError(
            f"{source}: heads of {config.head_dim} are not supported: multiples of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}"
        )
    if not 1 <= config.vocab_size <= MAX_SIZE:
        raise ModelFormatError(f"{source}: a vocabulary of {config.vocab_size}")
    if config.max_context > MAX_CONTEXT:
        raise ModelFormatError(f"{source}: a context of {config.max_context} tokens; at most {MAX_CONTEXT} work")
    _check_rope(config.rope, config.head_dim, source)
    outside = [i for i in config.eos_token_ids if i >= config.vocab_size]
    if outside:
        raise ModelFormatError(f"{source}: end token {outside[0]} is outside the vocabulary of {config.vocab_size}")
    return config


def _check_rope(rope: RopeConfig, head_dim: int, source: Path) -> None:
    if rope.rotary_dim % 2 or not 2 <= rope.rotary_dim <= head_dim:
        raise ModelFormatError(f"{source}: {rope.rotary_dim} rotary elements do not fit heads of {head_dim}")
    if rope.theta <= 1:
        raise ModelFormatError(f"{source}: a RoPE base of {rope.theta}; it must be over 1")
    factors = rope.frequency_factors
    if factors is None:
        return
    if len(factors) != rope.rotary_dim // 2:
        raise ModelFormatError(f"{source}: {len(factors)} RoPE factors for {rope.rotary_dim} elements")
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise ModelFormatError(f"{source}: RoPE factors must be over 0")
