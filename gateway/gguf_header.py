"""Reads the key-value part of a GGUF file, and nothing of its tensors.

The `gguf` package indexes every array element while it opens a file, which takes seconds for a vocabulary; the
gateway starts in well under one. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3,
little-endian).
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from pathlib import Path
from typing import Any

from tandem.errors import ModelFormatError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 10_000_000


class _Reader:
    """A cursor over the mapped file; `struct.error` past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        if length > len(self.data) - self.at:
            raise struct.error("string past the end")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", "surrogateescape")

    def strings(self, count: int) -> list[str]:
        """The one hot loop of start-up: a vocabulary and its merges."""
        data, at, length_at = self.data, self.at, struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            (length,) = length_at(data, at)
            at += 8
            raw = data[at : at + length]
            if len(raw) != length:
                raise struct.error("string past the end")
            found.append(raw.decode("utf-8", "surrogateescape"))
            at += length
        self.at = at
        return found

    def array(self) -> list[Any]:
        """One array's elements, from its type on. Raises struct.error past the end, KeyError for an unknown type."""
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if count > min(_MAX_ENTRIES, len(self.data) - self.at):
            raise struct.error("array past the end")
        if kind == _STRING:
            return self.strings(count)
        code = _SCALARS[kind]
        size = struct.calcsize(code) * count
        values = struct.unpack_from(f"<{count}{code[1]}", self.data, self.at)
        self.at += size
        return list(values)

    def value(self) -> Any:
        kind = self.scalar("<I")
        if kind == _STRING:
            return self.string()
        return self.array() if kind == _ARRAY else self.scalar(_SCALARS[kind])


def read_header(path: Path) -> tuple[dict[str, Any], str]:
    """The key-value pairs and their SHA-256 (hex). Raises ModelFormatError for what is no GGUF file or is cut short."""
    if not path.is_file():
        raise ModelFormatError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ModelFormatError(f"{path}: the file is empty")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data, path)
    except (struct.error, KeyError, UnicodeError) as exc:
        raise ModelFormatError(f"{path}: the GGUF header is truncated or damaged") from exc
    except (OSError, ValueError) as exc:
        raise ModelFormatError(f"{path}: can't be read as a model file ({exc})") from exc


def _parse(data: mmap.mmap, path: Path) -> tuple[dict[str, Any], str]:
    if data[:4] != b"GGUF":
        raise ModelFormatError(f"{path}: not a GGUF file (it doesn't begin with GGUF)")
    reader = _Reader(data)
    reader.at = 4
    version = reader.scalar("<I")
    if version not in (2, 3):
        raise ModelFormatError(f"{path}: GGUF version {version} is not supported, only 2 and 3 are")
    _tensors, pairs = reader.scalar("<Q"), reader.scalar("<Q")
    if pairs > 100_000:
        raise struct.error("too many pairs")
    fields = {}
    for _ in range(pairs):
        key = reader.string()
        fields[key] = reader.value()
    return fields, hashlib.sha256(data[: reader.at]).hexdigest()
