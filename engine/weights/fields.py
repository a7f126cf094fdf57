"""Typed look-ups in a checkpoint's metadata: a wrong or missing value becomes a ModelFormatError that names the key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tandem.errors import ModelFormatError

MAX_SIZE: Final = 1 << 31
MAX_EXPRESSION: Final = 1000
"""Characters."""
MAX_NUMBER: Final = 1e30
"""Finite in float32, and products of a few stay finite in float64."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Metadata `values` read from `source` (a path, for messages); `prefix` is put before every key."""

    source: str
    values: Mapping[str, object]
    prefix: str = ""

    def get(self, key: str) -> object:
        """The raw value; None when it is missing."""
        return self.values.get(self.prefix + key)

    def error(self, key: str, problem: str) -> ModelFormatError:
        """The error for `key`."""
        return ModelFormatError(f"{self.source}: {self.prefix}{key}: {problem}")

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE) -> int:
        """An integer within [low, high]; without `default` a missing one is an error."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"must be an integer between {low} and {high}, not {_shown(value)}")
        return value

    def optional_integer(self, key: str, *, low: int = 1, high: int = MAX_SIZE) -> int | None:
        """As `integer`; None when it is missing."""
        return None if self.get(key) is None else self.integer(key, low=low, high=high)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:
            raise self.error(key, f"must be a number, not {_shown(value)}")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number over 0."""
        value = self.number(key, default)
        if value <= 0:
            raise self.error(key, f"must be over 0, not {value}")
        return value

    def optional_number(self, key: str) -> float | None:
        """As `number`; None when it is missing."""
        return None if self.get(key) is None else self.number(key)

    def sides(self, key: str) -> tuple[int, int] | None:
        """Two integers over 0, as a list or as "128x128"; None when it is missing."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, str) and re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", value):
            value = [int(side) for side in value.split("x")]
        if isinstance(value, list) and len(value) == 2:
            first, second = value
            if type(first) is int and type(second) is int and min(value) > 0:
                return first, second
        raise self.error(key, f"must be two integers over 0, not {_shown(value)}")

    def expression(self, key: str, text: str) -> str:
        """`text` of `key`, when it is a regular expression."""
        try:
            if len(text) > MAX_EXPRESSION:
                raise ValueError(f"longer than {MAX_EXPRESSION} characters")
            re.compile(text)
        except (re.error, ValueError) as error:
            raise self.error(key, f"{_shown(text)} is no regular expression: {error}") from None
        return text

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {_shown(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.error(key, "is missing")
            return default
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, not {_shown(value)}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; empty when it is missing."""
        value = self.get(key)
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < MAX_SIZE for i in ids):
            raise self.error(key, f"must be a token id or a list of them, not {_shown(value)}")
        return tuple(ids)


def _shown(value: object) -> str:
    """At most 60 characters of `value`."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
