"""What a world is like, and a request as its gateway sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What the world is like, and what may go wrong once at any moment."""

    transport: str = "memory"
    prompts: tuple[int, ...] = (3,)
    """Tokens of each request's prompt. The second comes when the first is over, and is computed by D alone."""
    busy: bool = False
    """P1 is given another prompt to compute once the first request's call has ended there, and keeps it to the end."""
    max_tokens: int = 2
    senders: int = 1
    prefill_blocks: int = 2
    decode_blocks: int = 3
    sender_threads: bool = False
    """What a sender's threads do (serialize, read blocks) takes time; else it is one with what asked for it."""
    cancel: bool = False
    """The first request is given up."""
    retarget: str = ""
    """The first request is retargeted: to "P2", or "local"."""
    restart: str = ""
    """The process at "P1" or "D" is killed and starts again."""
    hang: bool = False
    """Whoever waits for a read over the network gives it up once; it arrives later."""
    corrupt: bool = False
    """One byte of a block is another when it arrives."""


@dataclass
class Ask:
    """One request as its gateway sees it."""

    number: int
    prompt: list[int]
    max_tokens: int
    started: bool = False
    admitted: Any = None
    attempt: int = 0
    sender: str = "P1"
    emitted: dict[int, int] = field(default_factory=dict)
    streamed: set[int] = field(default_factory=set)
    """Positions that the present Decode stream has brought."""
    prefill_due: bool = False
    retargeted: bool = False
    given_up: bool = False
    over: bool = False
    """Its Decode stream has ended well, or it is given up, or refused."""
    record: Any = None
    decode: Any = None
    """The handler's task, the process it runs in, and the queue of its requests."""
    calls: int = 0
    """Prefill calls so far."""
    current: int = -1
    """The Prefill call that the gateway listens to."""
    prefills: dict[int, Any] = field(default_factory=dict)
    """Calls that have not ended: the process and the handler's task."""
    unwanted: set[int] = field(default_factory=set)
    """Calls that will be told that they are cancelled."""
    retry_due: bool = False
    unsaid: Any = None
    """A Retarget that D will be told."""

    @property
    def name(self) -> str:
        return f"r{self.number}"

    def tokens(self) -> list[int]:
        """What was emitted, in order, up to the first gap."""
        return [self.emitted[p] for p in range(len(self.emitted)) if p in self.emitted]
