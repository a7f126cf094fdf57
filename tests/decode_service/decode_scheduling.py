"""Helpers of the scheduler's tests: records, a fake engine, and a driver that collects what a gateway would see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from decode_service.config import SchedulerConfig
from decode_service.events import Admission, Ended, Event, Finished, Tokens
from decode_service.scheduler import Scheduler
from decode_service.speculation.config import SpeculationConfig
from decode_service.speculation.proposer import Ask, Draft, OutputKey
from decode_service.speculation.speculator import Speculator
from engine.batch import Batch, Slice, StepOutput
from engine.block_pool import BlockPool
from engine.fake import FakeRunner
from tandem.errors import TandemError
from tandem.record import FinishReason, OutputState, Record, SamplingParams, StopRules
from worker.events import Failed

VOCAB = 97
EOS = 0


class TestRunner(FakeRunner):
    """The fake engine, which proves each step's KV, with failures to order."""

    __test__ = False

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size, vocab_size=VOCAB)
        self.fail_next = False
        self.bad_requests: set[str] = set()

    def run(self, batch: Batch) -> StepOutput:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the device is on fire")
        output = super().run(batch)
        for number, part in enumerate(batch.slices):
            if part.request_id in self.bad_requests:
                output.samples[number] = []
                output.errors[number] = TandemError("NaN")
        return output


class Knowing:
    """A proposer that knows what comes: `right(ask)` says how many tokens of it to tell before it lies.

    Lies are ids next to the right one, or outside the vocabulary.
    """

    name = "knowing"
    cheap = True

    def __init__(self, truth: Callable[[OutputKey], list[int]], right: Callable[[Ask], int]) -> None:
        self.right = right
        self.told: Callable[[Ask], list[int]] = lambda ask: truth(ask.key)
        self.known: set[OutputKey] = set()

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        self.known.update(ask.key for ask in asks)
        return [self._one(ask) for ask in asks]

    def _one(self, ask: Ask) -> Draft:
        rest = self.told(ask)[len(ask.output) :]
        right = min(self.right(ask), len(rest))
        lie = (rest[right] + 1) % (VOCAB + 1) if right < len(rest) else -1
        return Draft([*rest[:right], lie, *[lie] * ask.limit][: ask.limit], strength=min(right, 7))

    def observe(self, key: OutputKey, tokens: Sequence[int], accepted: int) -> None:
        assert 0 <= accepted <= len(tokens)

    def finished(self, key: OutputKey) -> None:
        self.known.discard(key)


@dataclass
class Seen:
    """What a gateway saw of one request: tokens by (index, position), ends."""

    tokens: dict[int, dict[int, int]] = field(default_factory=dict)
    logprobs: dict[int, int] = field(default_factory=dict)
    finished: dict[int, FinishReason] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    ended: Ended | None = None
    error: TandemError | None = None

    def output(self, index: int) -> list[int]:
        got = self.tokens.get(index, {})
        assert sorted(got) == list(range(len(got))) or not got or min(got) > 0, "a gap in the stream"
        return [got[position] for position in sorted(got)]


class Driver:
    """A scheduler with a shadow engine; checks the books after each step."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        *,
        prefix_cache: bool = True,
        speculation: SpeculationConfig | None = None,
        ahead: bool = False,
        **limits: int,
    ) -> None:
        """`ahead`: each step is computed only once the next one is scheduled, and whatever happens between two steps
        happens while one is under way."""
        self.ahead = ahead
        self.flight: Batch | None = None
        self.drawn: list[int] = []
        self.followed = 0
        values = {"max_step_tokens": 16, "max_sequences": 16, "max_context": 512, "vocab_size": VOCAB, **limits}
        self.pool = BlockPool(num_blocks, block_size, prefix_cache=prefix_cache)
        speculator = Speculator(speculation or SpeculationConfig(), VOCAB)
        self.scheduler = Scheduler(SchedulerConfig(eos_token_ids=(EOS,), **values), self.pool, speculator)
        self.runner = TestRunner(num_blocks, block_size)
        self.seen: dict[str, Seen] = {}

    def take(self, events: list[Event]) -> None:
        for event in events:
            seen = self.seen.setdefault(event.key, Seen())
            assert seen.ended is None, "news after the end"
            assert seen.error is None, "news after the end"
            if isinstance(event, Tokens):
                for delta in event.deltas:
                    assert delta.index not in seen.finished, "tokens after the finish"
                    for offset, token in enumerate(delta.token_ids):
                        old = seen.tokens.setdefault(delta.index, {}).setdefault(delta.position + offset, token)
                        assert old == token, "a token changed"
                    seen.drafted += delta.drafted
                    seen.accepted += delta.accepted
                    seen.logprobs[delta.index] = seen.logprobs.get(delta.index, 0) + len(delta.logprobs)
            elif isinstance(event, Finished):
                assert event.index not in seen.finished, "finished twice"
                seen.finished[event.index] = event.reason
            elif isinstance(event, Ended):
                seen.ended = event
            elif isinstance(event, Failed):
                seen.error = event.error

    def admit(self, key: str, record: Record, *, local: bool = True) -> Admission:
        admitted, events = self.scheduler.admit(key, record, local=local)
        self.take(events)
        return admitted

    def step(self) -> Batch | None:
        batch = self.flight or self.scheduler.schedule()
        self.flight = self.scheduler.schedule_ahead() if batch is not None and self.ahead else None
        if batch is not None:
            try:
                output = self.runner.run(self.resolved(batch))
                self.drawn = [token.token_id for tokens in output.samples for token in tokens]
            except RuntimeError as exc:
                self.flight = None
                self.take(self.scheduler.fail_step(TandemError(str(exc))))
            else:
                self.take(self.scheduler.update(batch, output))
                self.scheduler.timed(batch, 1.0 + 0.05 * batch.num_tokens)
        self.scheduler.check_integrity()
        return batch

    def resolved(self, batch: Batch) -> Batch:
        """A step with the tokens of the one before, as a device has them."""
        slices = []
        for part in batch.slices:
            if part.follows is not None:
                self.followed += 1
                token = self.drawn[part.follows]
                samples = [replace(spec, output=[*spec.output[:-1], token]) for spec in part.samples]
                part = replace(part, token_ids=[token], samples=samples, follows=None)
            slices.append(part)
        return Batch(slices, batch.copies)

    def receive(
        self, admitted: Admission, record: Record, firsts: list[list[int]], *, token_end: int | None = None
    ) -> None:
        """What a prefill worker does: KV of the needed range, then a commit with tokens per output."""
        tokens = [*record.prompt, *(record.outputs[0].token_ids if record.sampling.n == 1 else [])]
        if token_end is None:
            token_end = admitted.needed_end
        size = self.pool.block_size
        sender = FakeRunner(len(tokens), size, vocab_size=VOCAB)
        sender.run(Batch([Slice("sender", tokens[:token_end], 0, list(range(len(tokens))))]))
        first = admitted.needed_start // size
        for place in range(first, -(-token_end // size)):
            source, target = place * sender.block_bytes, admitted.blocks[place - first] * sender.block_bytes
            self.runner.buffer[target : target + sender.block_bytes] = sender.buffer[
                source : source + sender.block_bytes
            ]
        outputs = [
            OutputState([*output.token_ids, *first]) for output, first in zip(record.outputs, firsts, strict=True)
        ]
        self.take(self.scheduler.commit(admitted.key, Record(**{**as_fields(record), "outputs": outputs}), token_end))

    def run(self, limit: int = 2000) -> int:
        """Steps until nothing is left to compute."""
        for count in range(limit):
            if self.step() is None:
                return count
        raise AssertionError(f"still busy after {limit} steps")

    def assert_empty(self) -> None:
        assert len(self.scheduler) == 0
        assert self.pool.num_free == self.pool.num_blocks
        self.scheduler.check_integrity()


def as_fields(record: Record) -> dict[str, object]:
    return {name: getattr(record, name) for name in Record.__slots__}


def make_record(
    prompt: list[int] | int,
    *,
    max_tokens: int = 8,
    n: int = 1,
    seed: int = 0,
    outputs: list[list[int]] | None = None,
    ignore_eos: bool = True,
    logprobs: int | None = None,
    model_id: str = "",
    tenant: str = "",
    cache_scope: str = "",
    **stopping: Any,
) -> Record:
    """A record; an int prompt is that many tokens, different for each seed."""
    tokens = [(seed * 31 + i * 7 + 1) % VOCAB for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Record(
        request_id=f"r{seed}",
        model_id=model_id,
        prompt=list(tokens),
        sampling=SamplingParams(seed=seed, n=n),
        stopping=StopRules(max_tokens=max_tokens, ignore_eos=ignore_eos, **stopping),
        outputs=[OutputState(list(out)) for out in (outputs or [[] for _ in range(n)])],
        logprobs=logprobs,
        tenant=tenant,
        cache_scope=cache_scope,
    )


def undisturbed(record: Record) -> Seen:
    """What the record gives alone in a big pool without a cache."""
    driver = Driver(num_blocks=512, prefix_cache=False, max_step_tokens=512)
    copy = Record(**{**as_fields(record), "outputs": [OutputState() for _ in record.outputs]})
    driver.admit("alone", copy)
    driver.run()
    driver.assert_empty()
    return driver.seen["alone"]
