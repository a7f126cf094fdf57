"""Drafts by a model: what the draft model itself would say, from KV that is its own, within bounds."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_service.speculation.draft import DraftProposer
from decode_service.speculation.draft_memory import BorrowedMemory, OwnMemory
from decode_service.speculation.proposer import NOTHING, Ask, Draft, OutputKey
from engine.batch import Batch, SampledToken, Slice, StepOutput
from engine.block_pool import BlockPool
from engine.fake import FakeRunner
from tandem.errors import InternalError, TandemError
from tandem.record import SamplingParams, TokenLogprobs

BLOCK = 4
VOCAB = 50
GREEDY = SamplingParams(temperature=0.0)


class Rig:
    """A proposer over the fake engine, which proves every KV that it reads."""

    def __init__(self, num_blocks: int = 64, max_context: int = 200, catch_up_tokens: int = 1000) -> None:
        self.pool = BlockPool(num_blocks, BLOCK)
        self.runner = FakeRunner(num_blocks, BLOCK, vocab_size=VOCAB)
        self.memory = OwnMemory(self.pool)
        self.proposer = DraftProposer("draft", self.runner, self.memory, max_context, catch_up_tokens=catch_up_tokens)

    def propose(self, *asks: Ask) -> list[list[int]]:
        drafts = [list(draft.token_ids) for draft in self.proposer.propose(asks)]
        self.memory.check_integrity()
        return drafts

    def expected(self, ask: Ask) -> list[int]:
        """What the draft model writes after what is known."""
        found: list[int] = []
        seed, index = (0, 0) if ask.params.greedy else (ask.params.seed, ask.key.output)
        for position in range(len(ask.output), len(ask.output) + ask.limit):
            found.append(self.runner.expected([*ask.prompt, *ask.output, *found], seed, index, position))
        return found

    def tokens_run(self) -> list[int]:
        """Rows of each step since the last call."""
        batches, self.runner.batches = self.runner.batches, []
        return [batch.num_tokens for batch in batches]


def ask(
    name: str,
    prompt: Sequence[int],
    output: Sequence[int],
    limit: int = 4,
    params: SamplingParams = GREEDY,
    index: int = 0,
    scope: str = "",
) -> Ask:
    return Ask(OutputKey(name, index), prompt, output, limit, params, scope)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=7), SamplingParams(seed=7, repetition_penalty=1.2)])
def test_drafts_are_what_the_draft_model_draws_with_the_targets_noise(params: SamplingParams) -> None:
    rig = Rig()
    asks = [ask("a", range(9), [1, 2], 5, params), ask("b", [3], [4], 2, params, index=3), ask("c", [7] * 8, [1], 1)]
    assert rig.propose(*asks) == [rig.expected(one) for one in asks]
    assert rig.tokens_run() == [11 + 2 + 9, 2, 1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_drafts_are_right_whatever_was_kept_of_earlier_ones(data: st.DataObject) -> None:
    """Outputs go on with part of a draft, or with something else; some pause, some end; blocks may be short."""
    rig = Rig(num_blocks=data.draw(st.integers(6, 40)), catch_up_tokens=data.draw(st.integers(1, 20)))
    small = st.integers(0, VOCAB - 1)
    prompts = {name: data.draw(st.lists(small, min_size=1, max_size=20)) for name in "abc"}
    outputs = {name: [data.draw(small)] for name in prompts}
    for _ in range(data.draw(st.integers(1, 12))):
        names = data.draw(st.sets(st.sampled_from(sorted(outputs)), min_size=1))
        asks = [ask(name, prompts[name], outputs[name], data.draw(st.integers(1, 5))) for name in sorted(names)]
        for one, draft in zip(asks, rig.propose(*asks), strict=True):
            assert draft == rig.expected(one)[: len(draft)]
            kept = draft[: data.draw(st.integers(0, len(draft)))]
            outputs[one.key.request] += [*kept, data.draw(small)]
        if data.draw(st.booleans()):
            rig.proposer.finished(OutputKey(data.draw(st.sampled_from("abcd")), 0))
            rig.memory.check_integrity()
    for name in prompts:
        rig.proposer.finished(OutputKey(name, 0))
    assert rig.pool.num_free == rig.pool.num_blocks


def test_a_rejected_draft_costs_only_the_tokens_that_are_new() -> None:
    rig = Rig()
    first = ask("a", range(30), [1])
    (draft,) = rig.propose(first)
    rig.tokens_run()
    second = ask("a", range(30), [1, draft[0], draft[1] + 1])
    assert rig.propose(second) == [rig.expected(second)]
    assert rig.tokens_run() == [1, 1, 1, 1]
    (draft,) = rig.propose(third := ask("a", range(30), [*second.output, *rig.expected(second), 9]))
    assert draft == rig.expected(third)
    assert rig.tokens_run() == [3, 1, 1, 1, 2, 1, 1, 1][4:]


def test_a_prompt_is_computed_a_few_tokens_a_call_beside_others_drafts() -> None:
    rig = Rig(catch_up_tokens=10)
    long, short = ask("long", range(43), [1]), ask("short", [5], [6], limit=2)
    for _ in range(4):
        assert rig.propose(long, short) == [[], rig.expected(short)]
        assert rig.tokens_run()[0] <= 10 + 3
    assert rig.propose(long, short) == [rig.expected(long), rig.expected(short)]


def test_a_prompt_that_the_scope_has_computed_is_not_computed_again() -> None:
    rig = Rig()
    prompt = list(range(16))
    rig.propose(ask("a", prompt, [1], 1, scope="x"))
    rig.propose(ask("b", prompt, [2], 1, index=1, scope="x"))
    rig.propose(ask("c", prompt, [3], 1, scope="y"))
    assert rig.tokens_run() == [17, 1, 17]


def test_the_output_that_asked_least_recently_loses_its_blocks() -> None:
    rig = Rig(num_blocks=12)
    old, new = ask("old", range(16), [1], 1), ask("new", range(20, 36), [1], 1)
    rig.propose(old)
    rig.propose(new)
    third = ask("third", range(60, 68), [1], 1)
    assert rig.propose(third) == [rig.expected(third)]
    rig.tokens_run()
    rig.propose(new)
    assert rig.tokens_run() == [1]
    assert rig.propose(old) == [rig.expected(old)]


def test_who_finds_no_blocks_gets_no_draft_and_takes_none_from_those_that_ask() -> None:
    rig = Rig(num_blocks=6)
    both = ask("a", range(15), [1], 4), ask("b", range(20, 35), [1], 4)
    assert rig.propose(*both) == [rig.expected(both[0]), []]
    assert rig.propose(both[1]) == [rig.expected(both[1])]


def test_a_draft_ends_with_the_draft_models_context() -> None:
    rig = Rig(max_context=12)
    one = ask("a", range(9), [1], 4)
    assert rig.propose(one) == [rig.expected(one)[:3]]
    assert rig.propose(ask("a", range(9), [1, 2, 3, 4], 4)) == [[]]


class Doubtful(FakeRunner):
    """Gives the tokens of chosen positions little probability, or fails."""

    low: frozenset[int] = frozenset()
    bad: bool = False
    broken: bool = False

    def run(self, batch: Batch) -> StepOutput:
        if self.broken:
            raise InternalError("no device")
        output = super().run(batch)
        if self.bad:
            return StepOutput([[] for _ in batch.slices], {0: TandemError("NaN")})
        samples = [
            [
                SampledToken(drawn.token_id, TokenLogprobs(-3.0)) if spec.position in self.low else drawn
                for spec, drawn in zip(part.samples, drawns, strict=True)
            ]
            for part, drawns in zip(batch.slices, output.samples, strict=True)
        ]
        return StepOutput(samples)


def doubtful() -> tuple[Rig, Doubtful]:
    rig = Rig()
    runner = Doubtful(64, BLOCK, vocab_size=VOCAB)
    rig.runner, rig.proposer = runner, DraftProposer("draft", runner, rig.memory, 200)
    return rig, runner


def test_a_draft_ends_before_a_token_that_its_model_doubts() -> None:
    rig, runner = doubtful()
    runner.low = frozenset({3})
    one = ask("a", [1, 2], [5], 4)
    assert rig.propose(one) == [rig.expected(one)[:2]]
    assert rig.tokens_run() == [3, 1, 1]
    runner.low = frozenset({1})
    (draft,) = rig.proposer.propose([two := ask("b", [1, 2], [5], 4)])
    assert draft == Draft(rig.expected(two)[:1], strength=0)


def test_strength_is_the_probability_of_the_first_token() -> None:
    rig, _ = doubtful()
    (draft,) = rig.proposer.propose([ask("a", [1, 2], [5], 4)])
    assert draft.strength == 4  # exp(-0.5) of 8 classes


def test_an_output_whose_logits_are_not_numbers_gets_no_draft() -> None:
    rig, runner = doubtful()
    runner.bad = True
    assert rig.propose(ask("a", [1, 2], [5], 4)) == [[]]
    assert rig.pool.num_free == rig.pool.num_blocks
    runner.bad = False
    one = ask("a", [1, 2], [5], 4)
    assert rig.propose(one) == [rig.expected(one)]


def test_after_a_step_that_failed_nothing_is_trusted() -> None:
    rig, runner = doubtful()
    runner.broken = True
    one = ask("a", range(10), [5], 4)
    with pytest.raises(InternalError):
        rig.propose(one)
    assert rig.pool.num_free == rig.pool.num_blocks
    runner.broken = False
    assert rig.propose(one) == [rig.expected(one)]


class Borrower:
    """A proposer over the target's own KV, which is the fake engine's too."""

    def __init__(self, num_blocks: int = 16) -> None:
        self.pool = BlockPool(num_blocks, BLOCK)
        self.runner = FakeRunner(num_blocks, BLOCK, vocab_size=VOCAB)
        memory = BorrowedMemory()
        memory.borrow(self.pool)
        self.proposer = DraftProposer("self", self.runner, memory, 200)

    def computed(self, name: str, prompt: Sequence[int], output: Sequence[int], limit: int = 4) -> Ask:
        """An output whose tokens, all but the last, the target has computed."""
        known = [*prompt, *output][:-1]
        blocks = self.pool.allocate(-(-(len(known) + 1) // BLOCK))
        if known:
            self.runner.run(Batch([Slice(name, known, 0, blocks)]))
        return Ask(OutputKey(name, 0), prompt, output, limit, GREEDY, blocks=blocks)


@pytest.mark.parametrize("length", range(3, 9))
def test_the_targets_own_kv_is_read_and_never_written(length: int) -> None:
    borrower = Borrower()
    asks = [borrower.computed("a", range(length), [1], 6), borrower.computed("b", [9], [8], 3)]
    before, free = bytes(borrower.runner.buffer), borrower.pool.num_free
    held = [block for one in asks for block in one.blocks]
    borrower.runner.batches.clear()
    drafts = borrower.proposer.propose(asks)
    for one, draft in zip(asks, drafts, strict=True):
        assert list(draft.token_ids) == Rig.expected(borrower, one)  # type: ignore[arg-type]
    assert [batch.num_tokens for batch in borrower.runner.batches] == [2, 2, 2, 1, 1, 1]
    for block in held:
        at = slice(block * borrower.runner.block_bytes, (block + 1) * borrower.runner.block_bytes)
        assert bytes(borrower.runner.buffer[at]) == before[at]
    assert borrower.pool.num_free == free
    borrower.pool.check_integrity([held])


def test_without_free_blocks_the_target_goes_on_without_drafts() -> None:
    borrower = Borrower(num_blocks=3)
    one = borrower.computed("a", range(9), [1])
    assert borrower.proposer.propose([one]) == [NOTHING]
    borrower.pool.check_integrity([one.blocks])


def test_what_was_borrowed_is_given_back_after_a_failure() -> None:
    borrower = Borrower()
    one = borrower.computed("a", range(9), [1])
    borrower.runner.vocab_size = 0  # the fake divides by it
    with pytest.raises(ZeroDivisionError):
        borrower.proposer.propose([one])
    borrower.pool.check_integrity([one.blocks])
