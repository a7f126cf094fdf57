"""Quantises a Hugging Face folder to another: one tensor at a time is in memory, whatever the model's size.

Life cycle of a run: the source is opened and checked -> what each file will hold is planned, and headers written ->
weights are rounded and written layer by layer into OUT.part -> OUT.part becomes OUT. A run that fails leaves no OUT.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from engine.weights import open_checkpoint
from engine.weights.checkpoint import Checkpoint, StoredTensor
from engine.weights.hf_config import read_json
from engine.weights.rounding import FORMS, Form, Part
from engine.weights.safetensors import INDEX_NAME, RAW_DTYPES, SINGLE_NAME
from tandem.errors import ConfigError, ModelFormatError

SHARD_BYTES: Final = 4 << 30
COPIED: Final = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "tokenizer.model", "generation_config.json", "LICENSE", "README.md"),
)
_LINEAR: Final = re.compile(r"model\.layers\.(\d+)\..*_proj\.weight")
_SCALE_TYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Progress = Callable[[int, int], None]
"""Called with (tensors written, tensors in all)."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the source and what is written of it; `form` None: it is copied."""

    source: StoredTensor
    form: Form | None
    parts: Sequence[Part]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(_part_bytes(part) for part in self.parts)

    def names(self) -> list[str]:
        """The parts' full names."""
        layer = self.source.name.removesuffix("weight")
        return [self.source.name] if self.form is None else [layer + part.suffix for part in self.parts]


def quantize_folder(source: Path, out: Path, form: str, progress: Progress | None = None) -> None:
    """Write `out` from `source`: linear layers but the LM head in `form` (int4, int8, fp8), all else as it is.

    Raises ConfigError: an unknown form, an `out` that exists, a source that isn't a folder of plain weights.
    Raises ModelFormatError for a broken source: numbers that aren't finite are in it, too.
    """
    if form not in FORMS:
        raise ConfigError(f"--format: {form!r} is unknown; allowed: {', '.join(FORMS)}")
    with new_folder(source, out) as (checkpoint, part):
        _write(checkpoint, source, part, form, progress)


@contextlib.contextmanager
def new_folder(source: Path, out: Path) -> Iterator[tuple[Checkpoint, Path]]:
    """The open `source` and the folder OUT.part, which becomes `out` at the end; a body that fails leaves neither.

    Raises ConfigError for an `out` that exists or can't be written, a `source` that isn't a folder of plain weights.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already; name a folder that isn't")
    if not source.is_dir():
        raise ConfigError(f"{source} is no Hugging Face folder: only those are quantised")
    checkpoint = open_checkpoint(source)
    part = out.with_name(out.name + ".part")
    try:
        if checkpoint.coding:
            raise ConfigError(f"{source} is quantised already ({checkpoint.config.quantization})")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield checkpoint, part
        part.rename(out)
    except OSError as error:
        raise ConfigError(f"{out} can't be written: {error}") from error
    finally:
        checkpoint.close()
        shutil.rmtree(part, ignore_errors=True)


def linear_widths(checkpoint: Checkpoint) -> frozenset[int]:
    """How many inputs the layers that are quantised have."""
    return frozenset(tensor.shape[1] for tensor in checkpoint.stored() if _is_linear(tensor))


def copy_texts(source: Path, folder: Path) -> None:
    """The tokenizer and what else goes with a model, where `folder` hasn't its own."""
    for name in COPIED:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def _write(checkpoint: Checkpoint, source: Path, part: Path, form: str, progress: Progress | None) -> None:
    tensors = sorted(checkpoint.stored(), key=_layer_first)
    chosen = FORMS[form](linear_widths(checkpoint))
    planned = [_plan(tensor, chosen) for tensor in tensors]
    shards, done = _shards(planned), 0
    for number, shard in enumerate(shards):
        with (part / _shard_name(number, len(shards))).open("wb") as file:
            _write_header(file, shard)
            for tensor in shard:
                for data in _data(checkpoint, tensor):
                    file.write(data)
                checkpoint.release(tensor.source.name)
                done += 1
                if progress is not None:
                    progress(done, len(planned))
    if len(shards) > 1:
        _write_index(part, shards)
    config = {**read_json(source / "config.json"), "quantization_config": chosen.config()}
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_texts(source, part)


def _is_linear(tensor: StoredTensor) -> bool:
    return _LINEAR.fullmatch(tensor.name) is not None and len(tensor.shape) == 2 and tensor.type in _SCALE_TYPES


def _layer_first(tensor: StoredTensor) -> tuple[int, str]:
    """Layers in the order of their numbers, what is of no layer before them."""
    found = re.match(r"model\.layers\.(\d+)\.", tensor.name)
    return (-1 if found is None else int(found[1])), tensor.name


def _plan(tensor: StoredTensor, form: Form) -> Planned:
    if tensor.type not in RAW_DTYPES:
        raise ModelFormatError(f"tensor {tensor.name} has type {tensor.type}; supported: {', '.join(RAW_DTYPES)}")
    if not _is_linear(tensor):
        return Planned(tensor, None, [Part("", tensor.type, tensor.shape)])
    return Planned(tensor, form, form.parts(tensor.shape[0], tensor.shape[1], tensor.type))


def _part_bytes(part: Part) -> int:
    return math.prod(part.shape) * RAW_DTYPES[part.type].itemsize


def _shards(planned: Sequence[Planned]) -> list[list[Planned]]:
    """In order, each as full as `SHARD_BYTES` allows."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _shard_name(number: int, count: int) -> str:
    return SINGLE_NAME if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def _write_header(file: BinaryIO, shard: Sequence[Planned]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        for name, part in zip(tensor.names(), tensor.parts, strict=True):
            start, end = end, end + _part_bytes(part)
            header[name] = {"dtype": part.type, "shape": list(part.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)


def _data(checkpoint: Checkpoint, tensor: Planned) -> Iterator[memoryview]:
    """The bytes of each part."""
    if tensor.form is None:
        yield tensor.source.data
        return
    weight = checkpoint.tensor(tensor.source.name).float()
    # A NaN's code would be any number, and an infinity makes its whole row zeros.
    if weight.numel() and not all(bool(end.isfinite()) for end in weight.aminmax()):
        raise ModelFormatError(f"tensor {tensor.source.name} holds numbers that are not finite")
    for written in tensor.form.write(weight, _SCALE_TYPES[tensor.source.type]):
        yield _bytes(written)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _write_index(part: Path, shards: Sequence[Sequence[Planned]]) -> None:
    places = {
        name: _shard_name(number, len(shards))
        for number, shard in enumerate(shards)
        for tensor in shard
        for name in tensor.names()
    }
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (part / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
