"""The proposers by name, and which of them a worker has."""

from __future__ import annotations

from collections.abc import Callable, Collection
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


MODEL_FLAGS: Final = {"draft": "--draft-model", "self": "--self-draft-layers", "eagle": "--eagle-head"}
"""Those that need a model, and the flag that gives it; in order of preference after the others."""


def speculation(mode: str, max_tokens: int, *, fixed: bool = False, models: Collection[str] = ()) -> SpeculationConfig:
    """What the flags say. `mode`: "auto" (all proposers), "off", or names with commas between; `models`: which of
    MODEL_FLAGS' flags are there. Raises ConfigError.
    """
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise ConfigError(f"--speculation-tokens: must be 1 to {MAX_TOKENS}, got {max_tokens}")
    here = [*FACTORIES, *(name for name in MODEL_FLAGS if name in models)]
    names = {"auto": here, "off": []}.get(mode, [name.strip() for name in mode.split(",")])
    for name in names:
        if name not in here and name in MODEL_FLAGS:
            raise ConfigError(f"--speculation: {name} needs {MODEL_FLAGS[name]}")
        if name not in here:
            raise ConfigError(
                f"--speculation: {name!r} is not one of auto, off, {', '.join([*FACTORIES, *MODEL_FLAGS])}"
            )
    names = list(dict.fromkeys(names))
    proposers = [FACTORIES[name]() for name in names if name in FACTORIES]
    return SpeculationConfig(proposers, max_tokens, fixed, models=[name for name in names if name in MODEL_FLAGS])
