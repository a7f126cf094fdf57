"""Finds what is wrong with bytes that protobuf refused, so that the error can name the field.

protobuf's parser says only that parsing failed. This walks the wire format beside the message's descriptor, for refused
messages alone, so its speed doesn't matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from tandem.errors import InvalidRequestError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands in for a request that could not be parsed; the interceptor turns it into the error."""

    error: InvalidRequestError


def checked(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The same deserializer, except that bytes it refuses become a `Malformed` instead of an exception.

    An exception inside a deserializer would reach the client as INTERNAL.
    """
    descriptor = getattr(getattr(deserialize, "__self__", None), "DESCRIPTOR", None)

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except (DecodeError, UnicodeDecodeError) as exc:
            return Malformed(explain(data, descriptor) if descriptor is not None else InvalidRequestError(str(exc)))

    return parse


def explain(data: bytes, descriptor: Descriptor) -> InvalidRequestError:
    """The error for bytes that aren't a `descriptor` message; names the first field that is wrong."""
    try:
        path = _find(memoryview(data), descriptor, 0)
    except _BrokenWireError as exc:
        where = f" at {exc.path}" if exc.path else ""
        return InvalidRequestError(f"the bytes are not a {descriptor.name} message{where}", field=exc.path)
    if path is None:
        return InvalidRequestError(f"the bytes are not a {descriptor.name} message")
    return InvalidRequestError(f"{path} is not valid UTF-8", field=path)


class _BrokenWireError(Exception):
    """The wire format itself is broken inside field `path`."""

    def __init__(self, path: str = "") -> None:
        super().__init__(path)
        self.path = path


def _find(data: memoryview, descriptor: Descriptor, depth: int) -> str | None:
    """Path of the first string that isn't UTF-8; None when there is none. Raises _BrokenWireError."""
    if depth > _MAX_DEPTH:
        raise _BrokenWireError
    seen: dict[int, int] = {}
    offset = 0
    while offset < len(data):
        tag, offset = _varint(data, offset)
        number, wire_type = tag >> 3, tag & 7
        field = descriptor.fields_by_number.get(number)
        name = _name(field, seen)
        try:
            value, offset = _value(data, offset, wire_type)
        except _BrokenWireError:
            raise _BrokenWireError(name) from None
        if field is not None and value is not None and (found := _check(field, value, name, depth)):
            return found
    return None


def _check(field: FieldDescriptor, value: memoryview, name: str, depth: int) -> str | None:
    """The path inside one length-delimited field, or None when it is fine."""
    if field.type == FieldDescriptor.TYPE_STRING:
        try:
            str(value, "utf-8")
        except UnicodeDecodeError:
            return name
    elif field.message_type is not None:
        try:
            inner = _find(value, field.message_type, depth + 1)
        except _BrokenWireError as exc:
            raise _BrokenWireError(f"{name}.{exc.path}" if exc.path else name) from None
        return f"{name}.{inner}" if inner else None
    return None


def _name(field: FieldDescriptor | None, seen: dict[int, int]) -> str:
    """The field's name, with an index when it repeats."""
    if field is None:
        return ""
    if not field.is_repeated:
        return field.name
    index = seen.get(field.number, 0)
    seen[field.number] = index + 1
    return f"{field.name}[{index}]"


def _value(data: memoryview, offset: int, wire_type: int) -> tuple[memoryview | None, int]:
    """Skips a value; returns its bytes when it is length-delimited."""
    if wire_type == _VARINT:
        return None, _varint(data, offset)[1]
    if wire_type == _BYTES:
        length, offset = _varint(data, offset)
        return data[offset : offset + length], _within(data, offset + length)
    if wire_type in (_FIXED64, _FIXED32):
        return None, _within(data, offset + (8 if wire_type == _FIXED64 else 4))
    raise _BrokenWireError


def _varint(data: memoryview, offset: int) -> tuple[int, int]:
    """The number at `offset` and the offset behind it."""
    result = 0
    for shift in range(0, 70, 7):
        _within(data, offset + 1)
        byte = data[offset]
        offset += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, offset
    raise _BrokenWireError


def _within(data: memoryview, offset: int) -> int:
    if offset > len(data):
        raise _BrokenWireError
    return offset
