"""Hugging Face folders: config.json and safetensors, one file or sharded; memory-mapped, copied here only from float16.

Life cycle: as `engine.weights.checkpoint.Checkpoint` says. Headers are read here and not by the `safetensors` package:
each range is checked against the file's size, and mapping the file ourselves lets `release` give pages back.
Format: github.com/huggingface/safetensors (64-bit header length, JSON header, tensor bytes).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeGuard

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.weights.checkpoint import PICKLE_REFUSED, StoredTensor, check_config
from engine.weights.hf_config import hf_model_config, read_json
from engine.weights.mapping import MappedFile
from kernels.coded import CodedWeights
from kernels.int8 import GroupWeights
from tandem.errors import ModelFormatError

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
OLDER_NAMES: Final = "gptq_model-*.safetensors"
"""The single file as AutoGPTQ named it: gptq_model-4bit-128g.safetensors."""
MAX_HEADER_BYTES: Final = 100 << 20
MAX_SHARDS: Final = 4096
EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
DTYPES: Final[Mapping[str, torch.dtype]] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
RAW_DTYPES: Final[Mapping[str, torch.dtype]] = {
    **DTYPES,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Types that quantising tools write too."""
_NAMES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor lies; `start` and `length` in bytes."""

    file: MappedFile
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int


class SafetensorsCheckpoint:
    """A Hugging Face folder, see the module's text."""

    def __init__(self, folder: Path) -> None:
        """Map the folder's files and read their headers. Raises ModelFormatError as `open_checkpoint`."""
        self._folder = folder
        self._maps: list[MappedFile] = []
        self._entries: dict[str, _Entry] = {}
        try:
            if not (folder / "config.json").is_file():
                raise ModelFormatError(_not_a_model(folder))
            for path in _weight_files(folder):
                self._add(path)
            self._check_index()
            config = check_config(hf_model_config(folder, self._commonest_dtype()), folder)
            self._config = replace(config, tie_embeddings=config.tie_embeddings and not self._has_own_head())
        except BaseException:
            self.close()
            raise

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self._config

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self._folder

    @property
    def coding(self) -> str:
        """Nothing: types say all."""
        return ""

    @property
    def kv_scales(self) -> str:
        """As tools write them without saying more."""
        return "float8_e4m3"

    @property
    def files(self) -> Sequence[Path]:
        """config.json, generation_config.json when there, and the weights."""
        configs = [self._folder / name for name in ("config.json", "generation_config.json")]
        return (*(path for path in configs if path.exists()), *(file.path for file in self._maps))

    def names(self) -> Sequence[str]:
        """All tensors, sorted."""
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, outermost first."""
        return self._entry(name).shape

    def tensor(self, name: str) -> Tensor:
        """The tensor: float32 or bfloat16 as a view of the map, float16 as new float32 memory."""
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise _unsupported(name, entry, DTYPES)
        tensor = entry.file.tensor(entry.start, entry.shape, DTYPES[entry.dtype])
        return tensor.float() if entry.dtype == "F16" else tensor

    def dtype(self, name: str) -> torch.dtype | None:
        """The tensor's type; None: one that is not read."""
        return RAW_DTYPES.get(self._entry(name).dtype)

    def raw(self, name: str) -> Tensor:
        """The tensor in the type that the file has, a view of the map: never write to it."""
        entry = self._entry(name)
        if entry.dtype not in RAW_DTYPES:
            raise _unsupported(name, entry, RAW_DTYPES)
        return entry.file.tensor(entry.start, entry.shape, RAW_DTYPES[entry.dtype])

    def coded(self, name: str) -> CodedWeights | None:
        """None: see `engine.weights.quantized_checkpoint` for folders of quantised weights."""
        return None

    def codes(self, name: str) -> GroupWeights | None:
        """None, as `coded`."""
        return None

    def release(self, name: str) -> None:
        """Give the tensor's source pages back."""
        entry = self._entry(name)
        entry.file.drop(entry.start, entry.length)

    def stored(self) -> Iterator[StoredTensor]:
        """Every tensor as the files hold it, in order of name."""
        for name in self.names():
            entry = self._entries[name]
            yield StoredTensor(name, entry.dtype, entry.shape, entry.file.view(entry.start, entry.length))

    def close(self) -> None:
        """Unmap the files."""
        for file in self._maps:
            file.close()

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise ModelFormatError(f"{self._folder}: tensor {name} is missing") from None

    def _add(self, path: Path) -> None:
        file = MappedFile(path)
        self._maps.append(file)
        for name, entry in _read_header(file).items():
            if name in self._entries:
                raise ModelFormatError(f"{path}: tensor {name} is in two files")
            self._entries[name] = entry

    def _check_index(self) -> None:
        """The index of a sharded model names each tensor's file: files that were mixed up show here."""
        index = self._folder / INDEX_NAME
        if (self._folder / SINGLE_NAME).is_file() or not index.is_file():
            return
        for name, shard in _weight_map(index).items():
            found = self._entries.get(name)
            if found is None or found.file.path.name != shard:
                where = "is in no shard" if found is None else f"is in {found.file.path.name}"
                raise ModelFormatError(f"{index}: tensor {name} {where}; expected in {shard}")

    def _has_own_head(self) -> bool:
        """True when there is an LM head that differs from the embeddings: it wins, as in transformers 5.

        Whatever `tie_word_embeddings` says: a model whose head was trained apart would answer nonsense without it.
        """
        head, table = self._entries.get(HEAD), self._entries.get(EMBEDDING)
        if head is None or table is None:
            return False
        if (head.dtype, head.shape) != (table.dtype, table.shape):
            return True
        one, other = (entry.file.tensor(entry.start, (entry.length,), torch.uint8) for entry in (head, table))
        same = torch.equal(one, other)
        self.release(HEAD)
        self.release(EMBEDDING)
        return not same

    def _commonest_dtype(self) -> str:
        sizes: Counter[str] = Counter()
        for entry in self._entries.values():
            sizes[entry.dtype] += entry.length
        return _NAMES.get(sizes.most_common(1)[0][0], "unknown") if sizes else "unknown"


def _unsupported(name: str, entry: _Entry, known: Mapping[str, torch.dtype]) -> ModelFormatError:
    return ModelFormatError(f"{entry.file.path}: tensor {name} has type {entry.dtype}; supported: {', '.join(known)}")


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of `folder`, by its index when sharded."""
    index = folder / INDEX_NAME
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if not index.is_file():
        if len(older := sorted(folder.glob(OLDER_NAMES))) == 1:
            return older
        raise ModelFormatError(_not_a_model(folder))
    shards = sorted(set(_weight_map(index).values()))
    if len(shards) > MAX_SHARDS:
        raise ModelFormatError(f"{index}: {len(shards)} shards; at most {MAX_SHARDS}")
    for shard in shards:
        # A name with a separator could point anywhere on this machine.
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelFormatError(f"{index}: {shard!r} is not the name of a safetensors file beside it")
    return [folder / shard for shard in shards]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file. Raises ModelFormatError."""
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ModelFormatError(f"{index}: weight_map is missing or empty")
    return {str(name): str(shard) for name, shard in mapping.items()}


def _not_a_model(folder: Path) -> str:
    """Why `folder` holds no model, as helpful as can be."""
    names = sorted(entry.name for entry in folder.iterdir())
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return f"{folder}: a folder of GGUF files: give the file's path, such as {folder / gguf[0]}"
    if "config.json" not in names and any(name.endswith(".safetensors") for name in names):
        return f"{folder}: config.json is missing"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return f"{folder}: no safetensors files: {PICKLE_REFUSED}"
    if "tokenizer.json" in names or "tokenizer_config.json" in names:
        return f"{folder}: holds a tokenizer but no weights ({SINGLE_NAME} or {INDEX_NAME})"
    if "config.json" in names:
        return f"{folder}: has config.json but no weights ({SINGLE_NAME} or {INDEX_NAME})"
    return f"{folder}: not a model: no config.json and no {SINGLE_NAME}"


def _read_header(file: MappedFile) -> dict[str, _Entry]:
    """The tensors of one file, every range checked."""
    if file.size < 8:
        raise ModelFormatError(f"{file.path}: truncated: {file.size} bytes hold no safetensors header")
    length = int.from_bytes(file.view(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise ModelFormatError(f"{file.path}: not a safetensors file: its header would have {length} bytes")
    if 8 + length > file.size:
        raise ModelFormatError(
            f"{file.path}: truncated: the header ends at byte {8 + length}, the file has {file.size}"
        )
    try:
        header = json.loads(bytes(file.view(8, length)))
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{file.path}: not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ModelFormatError(f"{file.path}: not a safetensors file: its header is no JSON object")
    header.pop("__metadata__", None)
    entries = {str(name): _read_entry(file, str(name), value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        end = max(end, entry.start + entry.length)
        if end > file.size:
            problem = f"truncated: tensor {name} is expected to end at byte {end}, the file has {file.size}"
            raise ModelFormatError(f"{file.path}: {problem}")
    if end < file.size:
        raise ModelFormatError(f"{file.path}: damaged: its tensors end at byte {end}, the file has {file.size}")
    return entries


def _read_entry(file: MappedFile, name: str, value: object, base: int) -> _Entry:
    """One header entry; types that the engine cannot use are accepted here and refused when read."""
    invalid = ModelFormatError(f"{file.path}: not a valid safetensors file: entry {name!r}")
    if not isinstance(value, dict):
        raise invalid
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise invalid
    start, end = offsets
    if start > end:
        raise invalid
    itemsize = RAW_DTYPES[dtype].itemsize if dtype in RAW_DTYPES else None
    if itemsize is not None and math.prod(shape) * itemsize != end - start:
        raise ModelFormatError(f"{file.path}: tensor {name}: {end - start} bytes do not hold {dtype} {shape}")
    return _Entry(file, dtype, tuple(shape), base + start, end - start)


def _sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
