"""Helpers of the scheduler's tests: records, and a scheduler driven over the shadow-checking FakeRunner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.batch import Batch
from engine.block_pool import BlockPool
from engine.fake import FakeRunner
from prefill_service.config import SchedulerConfig
from prefill_service.events import Admission, Computed, Event, Sampled, Started
from prefill_service.scheduler import Scheduler
from tandem.errors import TandemError
from tandem.record import OutputState, Record, SamplingParams, StopRules, TokenDelta
from worker.events import Failed

VOCAB = 97
EOS = 0


def make_record(
    prompt: list[int] | int,
    *,
    seed: int = 0,
    n: int = 1,
    outputs: list[list[int]] | None = None,
    priority: int = 0,
    logprobs: int | None = None,
    tenant: str = "",
    cache_scope: str = "",
    model_id: str = "",
    **stopping: Any,
) -> Record:
    """An int prompt is that many tokens, different for each seed."""
    tokens = [(seed * 31 + i * 7 + i * i * 3 + 1) % VOCAB for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Record(
        request_id=f"r{seed}",
        model_id=model_id,
        prompt=list(tokens),
        sampling=SamplingParams(seed=seed, n=n),
        stopping=StopRules(**{"max_tokens": 8, **stopping}),
        outputs=[OutputState(list(out)) for out in (outputs or [[] for _ in range(n)])],
        priority=priority,
        logprobs=logprobs,
        tenant=tenant,
        cache_scope=cache_scope,
    )


def expected_tokens(record: Record, suppress: tuple[int, ...] = ()) -> dict[int, int]:
    """First tokens of a run that computes the whole prompt at once, alone, without a cache."""
    runner = FakeRunner(1, 1, vocab_size=VOCAB)
    found = {}
    for index, output in enumerate(record.outputs):
        tokens = [*record.prompt, *output.token_ids]
        if output.finish_reason is None and (len(record.outputs) == 1 or not output.token_ids):
            found[index] = runner.expected(tokens, record.sampling.seed, index, len(output.token_ids), suppress)
    return found


@dataclass
class Seen:
    """What the outside saw of one request."""

    started: Started | None = None
    token_ends: list[int] = field(default_factory=list)
    deltas: list[TokenDelta] | None = None
    error: TandemError | None = None

    @property
    def first_tokens(self) -> dict[int, int]:
        assert self.deltas is not None
        return {delta.index: delta.token_ids[0] for delta in self.deltas}


class Driver:
    """Checks the books after each step."""

    def __init__(self, num_blocks: int = 64, block_size: int = 4, *, prefix_cache: bool = True, **limits: Any) -> None:
        values = {"max_step_tokens": 16, "max_sequences": 8, "max_context": 512, "vocab_size": VOCAB, **limits}
        self.now = 0.0
        self.pool = BlockPool(num_blocks, block_size, prefix_cache=prefix_cache)
        config = SchedulerConfig(eos_token_ids=(EOS,), **values)
        self.scheduler = Scheduler(config, self.pool, clock=lambda: self.now)
        self.runner = FakeRunner(num_blocks, block_size, vocab_size=VOCAB)
        self.seen: dict[str, Seen] = {}

    def submit(self, key: str, record: Record) -> Admission:
        self.now += 0.001
        admission = self.scheduler.submit(key, record)
        self.seen[key] = Seen()
        return admission

    def take(self, events: list[Event]) -> None:
        for event in events:
            seen = self.seen[event.key]
            assert seen.error is None, "news after the failure"
            if isinstance(event, Started):
                assert seen.started is None, "started twice"
                seen.started = event
            elif isinstance(event, Computed):
                assert seen.started is not None, "computed before the start"
                assert event.token_end > max(seen.token_ends, default=seen.started.ready_tokens - 1)
                seen.token_ends.append(event.token_end)
            elif isinstance(event, Sampled):
                assert seen.deltas is None, "sampled twice"
                seen.deltas = event.deltas
            elif isinstance(event, Failed):
                seen.error = event.error

    def schedule(self) -> Batch | None:
        events, batch = self.scheduler.schedule()
        self.take(events)
        self.scheduler.check_integrity()
        return batch

    def finish(self, batch: Batch) -> None:
        self.take(self.scheduler.update(batch, self.runner.run(batch)))
        self.scheduler.check_integrity()

    def step(self) -> Batch | None:
        self.now += 1.0
        batch = self.schedule()
        if batch is not None:
            self.finish(batch)
        return batch

    def run(self, limit: int = 2000) -> int:
        """Steps until nothing is left to compute."""
        for count in range(limit):
            if self.step() is None:
                return count
        raise AssertionError(f"still busy after {limit} steps")

    def release(self, *keys: str) -> None:
        for key in keys or tuple(self.seen):
            self.scheduler.release(key)
        self.scheduler.check_integrity()

    def assert_empty(self) -> None:
        assert len(self.scheduler) == 0
        assert self.pool.num_free == self.pool.num_blocks
        load = self.scheduler.load()
        assert (load.running_requests, load.waiting_requests, load.sending_requests) == (0, 0, 0)
        assert load.queued_prefill_tokens == 0
        self.scheduler.check_integrity()
