"""What a peer is: a name, what it installs, which weights it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Peer:
    """One engine that Tandem is measured beside."""

    name: str
    """Of its environment's folder, and of its driver `bench.peers.NAME`."""
    title: str
    requirement: str
    """What pip installs."""
    weights: Literal["gguf", "hf"]
    """The GGUF file itself, or a Hugging Face folder of bfloat16 made from it."""
    unwanted: tuple[str, ...] = ()
    """Distributions that come along and are taken out again."""
    build_environment: Mapping[str, str] = field(default_factory=dict)
    """Variables for pip."""

    @property
    def distribution(self) -> str:
        """The requirement without its version."""
        return self.requirement.partition("==")[0]
