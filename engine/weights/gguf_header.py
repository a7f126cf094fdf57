"""Reads a GGUF file's header: metadata and the tensor directory.

The `gguf` package's own reader makes numpy objects of every string of the vocabulary, 3 s for 49,000 tokens; an engine
needs none of them. This one steps over long arrays (their length stays known) and checks every length against the
file's size, so that a truncated file is an error and not a crash.
Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from engine.weights.mapping import MappedFile
from tandem.errors import ModelFormatError

MAX_TENSORS: Final = 1 << 18
MAX_FIELDS: Final = 1 << 12
MAX_HEADER_BYTES: Final = 128 << 20
"""Far above any vocabulary; bounds what a hostile file can make this process read and keep."""
MAX_KEPT_ARRAY: Final = 4096
"""Longer arrays (vocabularies) are stepped over."""

_SCALARS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING: Final = 8
_ARRAY: Final = 9


@dataclass(frozen=True, slots=True)
class SkippedArray:
    """An array that was too long to keep."""

    length: int


Value = bool | int | float | str | list[bool | int | float | str] | SkippedArray


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `shape` outermost first, `start` and `length` in bytes from the file's start."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Header:
    """A GGUF file's metadata and tensor directory."""

    fields: Mapping[str, Value]
    tensors: Mapping[str, TensorEntry]


class _Cursor:
    """Reads little-endian values one after another and never past the file's end."""

    def __init__(self, file: MappedFile) -> None:
        self._path = file.path
        self._data = file.view(0, min(file.size, MAX_HEADER_BYTES))
        self._whole = len(self._data) == file.size
        self.at = 0

    def take(self, length: int) -> memoryview:
        """The next `length` bytes."""
        end = self.at + length
        if end > len(self._data) and not self._whole:
            raise ModelFormatError(f"{self._path}: not a valid GGUF file: a header of over {MAX_HEADER_BYTES} bytes")
        if end > len(self._data):
            raise ModelFormatError(
                f"{self._path}: truncated: its header goes on past the file's {len(self._data)} bytes"
            )
        piece = self._data[self.at : end]
        self.at = end
        return piece

    def number(self, code: str) -> int:
        """One integer of struct format `code`."""
        return int(struct.unpack(code, self.take(struct.calcsize(code)))[0])

    def text(self) -> str:
        """A string: 64-bit length, then UTF-8."""
        return bytes(self.take(self.number("<Q"))).decode("utf-8", errors="replace")

    def value(self) -> Value:
        """A typed metadata value."""
        kind = self.number("<I")
        return self._array() if kind == _ARRAY else self._scalar(kind)

    def _scalar(self, kind: int) -> bool | int | float | str:
        if kind == _STRING:
            return self.text()
        code = _SCALARS.get(kind)
        if code is None:
            raise ModelFormatError(f"{self._path}: not a valid GGUF file: value type {kind} at byte {self.at}")
        scalar: bool | int | float = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return scalar

    def _array(self) -> Value:
        kind, length = self.number("<I"), self.number("<Q")
        if kind == _ARRAY:
            raise ModelFormatError(f"{self._path}: nested arrays in GGUF metadata are not supported")
        if length <= MAX_KEPT_ARRAY:
            return [self._scalar(kind) for _ in range(length)]
        if kind != _STRING:
            code = _SCALARS.get(kind)
            if code is None:
                raise ModelFormatError(f"{self._path}: not a valid GGUF file: array type {kind} at byte {self.at}")
            self.take(struct.calcsize(code) * length)
            return SkippedArray(length)
        for _ in range(length):
            self.take(self.number("<Q"))
        return SkippedArray(length)


def read_header(file: MappedFile) -> Header:
    """The header of a mapped GGUF file, every tensor's range checked against the file's size.

    Raises ModelFormatError: not a GGUF file, an unknown version or type, truncated.
    """
    if bytes(file.view(0, 4)) != b"GGUF":
        raise ModelFormatError(f"{file.path}: not a GGUF file (it does not begin with GGUF)")
    cursor = _Cursor(file)
    cursor.take(4)
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ModelFormatError(f"{file.path}: GGUF version {version} is not supported; known: 2, 3 (little-endian)")
    num_tensors, num_fields = cursor.number("<Q"), cursor.number("<Q")
    if num_tensors > MAX_TENSORS or num_fields > MAX_FIELDS:
        raise ModelFormatError(f"{file.path}: not a valid GGUF file: {num_tensors} tensors, {num_fields} fields")
    fields: dict[str, Value] = {}
    for _ in range(num_fields):
        key = cursor.text()
        fields[key] = cursor.value()
    return Header(fields, _read_directory(file, cursor, num_tensors, _alignment(file, fields)))


def read_texts(file: MappedFile, key: str) -> list[str]:
    """The array of strings `key`, however long, of a file that `read_header` accepts; empty when it is not there."""
    cursor = _Cursor(file)
    cursor.take(16)  # magic, version, number of tensors
    for _ in range(cursor.number("<Q")):
        if cursor.text() != key:
            cursor.value()
        elif (cursor.number("<I"), cursor.number("<I")) == (_ARRAY, _STRING):
            return [cursor.text() for _ in range(cursor.number("<Q"))]
        else:
            raise ModelFormatError(f"{file.path}: {key} must be an array of strings")
    return []


def _alignment(file: MappedFile, fields: Mapping[str, Value]) -> int:
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ModelFormatError(f"{file.path}: general.alignment must be a power of two, not {alignment!r}")
    return alignment


def _read_directory(file: MappedFile, cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for _ in range(count):
        entry = _read_entry(file, cursor)
        if entry.name in entries:
            raise ModelFormatError(f"{file.path}: tensor {entry.name} is there twice")
        entries[entry.name] = entry
    base = -(-cursor.at // alignment) * alignment
    return {name: _placed(file, entry, base) for name, entry in entries.items()}


def _read_entry(file: MappedFile, cursor: _Cursor) -> TensorEntry:
    """One directory entry, its `start` still counted from the data section."""
    name, num_dims = cursor.text(), cursor.number("<I")
    if not 1 <= num_dims <= 4:
        raise ModelFormatError(f"{file.path}: tensor {name} has {num_dims} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(num_dims))[::-1]
    kind, start = cursor.number("<I"), cursor.number("<Q")
    try:
        quantization = GGMLQuantizationType(kind)
    except ValueError as error:
        raise ModelFormatError(f"{file.path}: tensor {name} has the unknown type {kind}") from error
    block, block_bytes = GGML_QUANT_SIZES[quantization]
    if shape[-1] % block:
        raise ModelFormatError(f"{file.path}: tensor {name}: rows of {shape[-1]} do not divide into blocks of {block}")
    elements = 1
    for side in shape:
        elements *= side
    return TensorEntry(name, quantization, shape, start, elements // block * block_bytes)


def _placed(file: MappedFile, entry: TensorEntry, base: int) -> TensorEntry:
    start = base + entry.start
    if start + entry.length > file.size:
        raise ModelFormatError(
            f"{file.path}: truncated: tensor {entry.name} ends at byte {start + entry.length}, the file has {file.size}"
        )
    return TensorEntry(entry.name, entry.type, entry.shape, start, entry.length)
