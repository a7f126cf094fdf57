"""The ways of running that must not change a single bit, and the selections of them that CI and `make exact` run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

BLOCK_SIZE = 16

Pick = Literal["all", "many", "few"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of running the same prompts. `pick` says which of them, `greedy` and `sampled` how many tokens of each
    kind: what CI saves on.
    """

    chunk_size: int = 512
    transport: str = "shm"
    concurrency: int = 16
    prefix_cache: bool = True
    workers: int = 1
    preempt: bool = False
    prefill: bool = True
    pick: Pick = "all"
    greedy: int = 64
    sampled: int = 32
    compute: Literal["exact", "int8"] = "exact"
    prefill_block_size: int = BLOCK_SIZE
    speculation: Literal["off", "auto", "fixed"] = "auto"
    """Drafts by prompt lookup: none, as many as pay, or all of them at full length, right or wrong."""

    @property
    def name(self) -> str:
        """Names the test."""
        return (
            f"chunk{self.chunk_size}-{self.transport}-at{self.concurrency}-"
            f"{'cache' if self.prefix_cache else 'nocache'}-{self.workers}w{'-preempt' if self.preempt else ''}"
            f"{'' if self.prefill else '-aggregated'}{'' if self.compute == 'exact' else '-int8'}"
            f"{'' if self.prefill_block_size == BLOCK_SIZE else f'-blocks{self.prefill_block_size}'}"
            f"{'' if self.speculation == 'auto' else f'-drafts-{self.speculation}'}"
        )

    def chosen(self, prompts: Mapping[int, list[int]], longest: int | None = None) -> dict[int, list[int]]:
        """The prompts this way runs, of at most `longest` tokens, in the order of their start."""
        limit = {"all": None, "many": 64, "few": 300}[self.pick]
        few = {0, 5, 19, 21, 23, 26, 30}
        chosen = {
            number: prompt
            for number, prompt in prompts.items()
            if (limit is None or len(prompt) <= limit)
            and (longest is None or len(prompt) <= longest)
            and (self.pick != "few" or number in few)
        }
        if self.preempt:
            # The longest fills nearly all of a tight pool, the short ones after it the rest; and then all grow.
            first = max(chosen, key=lambda number: len(chosen[number]))
            chosen = {first: chosen.pop(first), **chosen}
        return chosen

    def flags(self, prompts: Sequence[list[int]] = ()) -> list[str]:
        """Flags of `tandem up`, for these prompts."""
        flags = ["--compute", self.compute, "--chunk-size", str(self.chunk_size)]
        flags += ["--dtype", "float32"] if self.compute == "exact" else []
        flags += ["--transport", self.transport, "--block-size", str(BLOCK_SIZE)]
        if self.prefill_block_size != BLOCK_SIZE:
            flags += ["--prefill-block-size", str(self.prefill_block_size)]
        flags += ["--decode", str(self.workers), "--prefill", str(self.workers if self.prefill else 0)]
        # Decode would prefill short prompts itself, and then nothing would travel.
        flags += ["--local-prefill-threshold", "0"] if self.prefill else []
        flags += ["--speculation", "off" if self.speculation == "off" else "ngram"]
        if self.speculation == "fixed":
            flags.append("--speculation-fixed")
        if not self.prefix_cache:
            flags.append("--no-prefix-cache")
        if self.preempt:
            flags += ["--num-blocks", str(self.tight_pool(prompts))]
        return flags

    def tight_pool(self, prompts: Sequence[list[int]]) -> int:
        """Hardly more blocks than the longest prompt with its output takes: sequences must give way to each other."""
        return (max(map(len, prompts)) + self.greedy) // BLOCK_SIZE + 1 + 2


# What all others are compared with, and `transformers` with it.
BASELINE = Variant(prefix_cache=False, workers=2, speculation="off")


def _full() -> list[Variant]:
    """All but preemption at one at a time, which can't happen.

    In small chunks a long prompt arrives so slowly that those before it are over, and with two workers it has one for
    itself: only short prompts come into each other's way then.
    """
    axes = product((1, 7, 64, 512), ("shm", "grpc"), (1, 16), (True, False), (1, 2), (False, True))
    rows = [Variant(*row) for row in axes]
    apart = [row for row in rows if row.preempt and (row.chunk_size < 64 or row.workers > 1)]
    rows = [replace(row, pick="many") if row in apart else row for row in rows]
    rows = [row for row in rows if row != BASELINE and not (row.preempt and row.concurrency == 1)]
    return [
        *rows,
        Variant(prefill=False),
        Variant(prefill=False, concurrency=1),
        Variant(prefill=False, prefix_cache=False, preempt=True, pick="many"),
        *(Variant(concurrency=limit, speculation="fixed") for limit in (1, 16)),
    ]


FULL = _full()

# With the baseline: every pair of values of any two axes (but preemption at one at a time) in at least one row, and
# every value in at least one row that runs all prompts (but chunk size 1). test_matrix.py holds this.
PAIRWISE = [
    Variant(512, "shm", 16, True, 1, True, speculation="fixed"),
    Variant(7, "shm", 16, False, 2, True, pick="many"),
    Variant(1, "grpc", 16, False, 1, True, pick="few", sampled=16),
    Variant(512, "grpc", 1, False, 2, False, pick="few", greedy=32, sampled=16),
    Variant(64, "shm", 1, False, 2, False, greedy=16, sampled=16, speculation="fixed"),
    Variant(1, "shm", 1, True, 2, False, pick="few", greedy=32, sampled=16),
    Variant(prefill=False, pick="many"),
    Variant(64, "grpc", 16, True, 1, True, pick="many"),
    Variant(7, "grpc", 1, True, 1, False, greedy=16, sampled=8, prefill_block_size=24),
]

# Compute int8 keeps the promise among its own runs: the first is what the others are compared with.
INT8 = [
    Variant(prefix_cache=False, compute="int8", speculation="off"),
    Variant(7, "grpc", 16, True, 2, False, pick="many", compute="int8"),
    Variant(
        *(64, "shm", 16, True, 1, True),
        greedy=32,
        sampled=16,
        compute="int8",
        prefill_block_size=24,
        speculation="fixed",
    ),
    Variant(512, "shm", 1, False, 1, False, prefill=False, pick="few", compute="int8"),
]
