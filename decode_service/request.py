"""One request aboard a decode worker. Torch-free; facts only, the scheduler decides.

The life of a request:
    receiving --commit--> running --every output finished--> over
        |  \\--start_local----^  |
        |                       +--preempt--> waiting --resume--> running (recomputed from the record)
        +--cancel--> releasing --release (copies in flight are over)--> over

While the prompt is computed there is one chain of KV, the trunk, shared by all outputs; then it splits, and each live
output has a chain of its own. With one live output the trunk also covers the tokens that this output has already
(forced tokens of a record).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from engine.block_pool import BlockPool
from engine.block_table import BlockTable
from tandem.record import OutputState, Record


class State(Enum):
    """Where a request is in its life."""

    RECEIVING = "receiving"
    RUNNING = "running"
    WAITING = "waiting"
    RELEASING = "releasing"


@dataclass(slots=True, eq=False)
class Chain:
    """The KV of one chain of tokens: its blocks, how many tokens are computed, and the names of its full blocks."""

    table: BlockTable
    computed: int = 0
    hashes: list[bytes] = field(default_factory=list)

    def fork(self) -> Chain:
        """Another chain over the same blocks."""
        return Chain(self.table.fork(), self.computed, list(self.hashes))


@dataclass(slots=True, eq=False)
class Output:
    """One of the n outputs. `streamed` counts the tokens that the gateway has or was sent."""

    index: int
    state: OutputState
    streamed: int = 0
    announced: bool = False
    """True once the gateway knows that it is finished."""
    drafted: int = 0
    accepted: int = 0
    """Drafts verified and kept that the gateway wasn't told of yet."""
    chain: Chain | None = None

    @property
    def live(self) -> bool:
        """True while it needs more tokens."""
        return self.state.finish_reason is None


@dataclass(slots=True, eq=False)
class Share:
    """What one chain could do in the next step: compute tokens up to `end`. `output` is None for the trunk."""

    chain: Chain
    output: Output | None
    end: int

    @property
    def pending(self) -> int:
        """Tokens to compute; 1 is a decode step."""
        return self.end - self.chain.computed


@dataclass(slots=True, eq=False)
class Request:
    """One request. `order` is its age: the lowest is the oldest."""

    key: str
    record: Record
    order: int
    state: State
    stops: frozenset[int]
    root: bytes
    outputs: list[Output]
    trunk: Chain | None = None
    preemptions: int = 0
    received_blocks: int = 0
    """Blocks taken from the pool for a transfer, while receiving."""
    hashes: list[bytes] = field(default_factory=list)
    """Names of the trunk's full blocks as far as computed last; kept over preemptions."""
    last_step: int = 0
    """Number of the last step that it took part in."""

    @property
    def live(self) -> list[Output]:
        """Outputs that need more tokens; not to be changed."""
        outputs = self.outputs
        if len(outputs) == 1:  # as of nearly all requests, which are asked many times a step
            return outputs if outputs[0].state.finish_reason is None else []
        return [output for output in outputs if output.live]

    @property
    def shared_end(self) -> int:
        """Tokens of the trunk: the prompt, and with one live output also that output's tokens."""
        live = self.live
        return len(self.record.prompt) + (len(live[0].state.token_ids) if len(live) == 1 else 0)

    @property
    def needed_end(self) -> int:
        """Tokens whose KV a prefill worker computes: the prompt, and the one output's tokens of a record with n = 1."""
        return len(self.record.prompt) + (len(self.outputs[0].state.token_ids) if len(self.outputs) == 1 else 0)

    @property
    def total_tokens(self) -> int:
        """Tokens of the prompt and of every live output."""
        return len(self.record.prompt) + sum(len(output.state.token_ids) for output in self.live)

    def shares(self) -> list[Share]:
        """The chains that can compute now, the oldest output first."""
        if self.trunk is not None:
            return [Share(self.trunk, None, self.shared_end)]
        prompt = len(self.record.prompt)
        return [
            Share(output.chain, output, prompt + len(output.state.token_ids))
            for output in self.outputs
            if output.chain is not None
        ]

    def pending_prompt(self) -> int:
        """Tokens that its chains have to compute, those that have more than one."""
        if self.trunk is None:
            return sum(share.pending for share in self.shares() if share.pending > 1)
        pending = self.shared_end - self.trunk.computed
        return pending if pending > 1 else 0

    def tokens(self, start: int, end: int, output: Output | None) -> list[int]:
        """Tokens start .. end-1 of a chain (None: the trunk's)."""
        prompt = self.record.prompt
        if output is None and len(live := self.live) == 1:
            output = live[0]
        tail: list[int] = output.state.token_ids if output is not None else []
        size = len(prompt)
        if start >= size:
            return tail[start - size : end - size]
        return [*prompt[start : min(end, size)], *tail[max(0, start - size) : max(0, end - size)]]

    def split(self) -> None:
        """The trunk is computed: every live output goes its own way. The last takes the trunk itself."""
        trunk, live = self.trunk, self.live
        assert trunk is not None
        assert live
        self.trunk = None
        for output in live[:-1]:
            output.chain = trunk.fork()
        live[-1].chain = trunk

    def free(self) -> None:
        """Give back all blocks."""
        for chain in self.chains():
            chain.table.free()
        self.trunk = None
        for output in self.outputs:
            output.chain = None

    def chains(self) -> Iterator[Chain]:
        """Every chain that holds blocks."""
        if self.trunk is not None:
            yield self.trunk
        for output in self.outputs:
            if output.chain is not None:
                yield output.chain


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)


def most_blocks(pool: BlockPool, prompt: int, outputs: int, max_tokens: int) -> int:
    """The most blocks that `outputs` outputs of at most `max_tokens` tokens can come to hold beside a shared prompt."""
    shared = prompt // pool.block_size
    return shared + outputs * blocks_for(prompt % pool.block_size + max_tokens, pool.block_size)
