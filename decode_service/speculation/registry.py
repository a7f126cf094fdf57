"""The proposers by name, and which of them a worker has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from decode_service.speculation.config import MAX_TOKENS, SpeculationConfig
from decode_service.speculation.ngram import NgramProposer
from decode_service.speculation.proposer import Proposer
from decode_service.speculation.suffix import SuffixProposer
from tandem.errors import ConfigError

FACTORIES: Final[dict[str, Callable[[], Proposer]]] = {
    NgramProposer.name: NgramProposer,
    SuffixProposer.name: SuffixProposer,
}
"""In order of preference where drafts are equally good. Those in here need nothing but the tokens."""


def speculation(mode: str, max_tokens: int, *, fixed: bool = False) -> SpeculationConfig:
    """What the flags say. `mode`: "auto" (all proposers), "off", or names with commas between. Raises ConfigError."""
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise ConfigError(f"--speculation-tokens: must be 1 to {MAX_TOKENS}, got {max_tokens}")
    names = {"auto": list(FACTORIES), "off": []}.get(mode, [name.strip() for name in mode.split(",")])
    for name in names:
        if name not in FACTORIES:
            raise ConfigError(f"--speculation: {name!r} is not one of auto, off, {', '.join(FACTORIES)}")
    return SpeculationConfig([FACTORIES[name]() for name in dict.fromkeys(names)], max_tokens, fixed)
