"""The fake runner finds the mistakes it is there to find, and is otherwise deterministic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.batch import Batch, SampleSpec, Slice, StepOutput
from engine.fake import SLOT_BYTES, FakeRunner
from tandem.errors import InternalError
from tandem.record import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def step(runner: FakeRunner, *slices: Slice, copies: list[tuple[int, int]] | None = None) -> StepOutput:
    return runner.run(Batch(list(slices), copies or []))


def spec(prompt: list[int], output: list[int] | None = None, params: SamplingParams = GREEDY) -> SampleSpec:
    return SampleSpec(0, params, len(output or []), prompt, output or [])


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner(8, 4)


def test_tokens_depend_on_the_sequence_only(runner: FakeRunner) -> None:
    prompt = [1, 2, 3, 4, 5, 6]
    whole = step(runner, Slice("a", prompt, 0, [3, 5], [spec(prompt)]))
    step(runner, Slice("b", prompt[:2], 0, [0]))
    step(runner, Slice("b", prompt[2:5], 2, [0, 7]))
    chunked = step(runner, Slice("b", prompt[5:], 5, [0, 7], [spec(prompt)]))
    assert whole == chunked
    token = whole.samples[0][0].token_id
    assert token == runner.expected(prompt, 0, 0, 0)
    (((after,),),) = (step(runner, Slice("a", [token], 6, [3, 5], [spec(prompt, [token])])).samples,)
    assert after.token_id == runner.expected([*prompt, token], 0, 0, 1)


def test_draws_have_their_keys(runner: FakeRunner) -> None:
    sampled = SamplingParams(seed=5)
    specs = [
        spec([1], params=sampled),
        replace(spec([1], params=sampled), index=1),
        spec([1], params=replace(sampled, seed=6)),
        spec([1]),
    ]
    banned = runner.expected([1], 5, 0, 0)
    specs.append(replace(specs[0], suppress=(banned,), logprobs=2))
    drawn = step(runner, Slice("a", [1], 0, [0], specs)).samples[0]
    assert [item.token_id for item in drawn[:3]] == [
        runner.expected([1], 5, 0, 0),
        runner.expected([1], 5, 1, 0),
        runner.expected([1], 6, 0, 0),
    ]
    assert drawn[4].token_id == runner.expected([1], 5, 0, 0, (banned,)) != banned
    assert drawn[4].logprobs is not None
    assert len(drawn[4].logprobs.top_token_ids) == 2


def test_copies_come_first_and_carry_the_contents(runner: FakeRunner) -> None:
    step(runner, Slice("a", [1, 2], 0, [0]))
    step(runner, Slice("a", [3], 2, [6], [spec([1, 2, 3])]), copies=[(0, 5), (5, 6)])


def test_memory_of_the_caller_carries_everything() -> None:
    left, memory = FakeRunner(2, 4), bytearray(3 * 4 * SLOT_BYTES)
    step(left, Slice("a", [1, 2, 3, 4], 0, [1]))
    right = FakeRunner(3, 4, buffer=memory)
    memory[2 * right.block_bytes :] = left.buffer[left.block_bytes :]
    step(right, Slice("a", [5], 4, [2, 0], [spec([1, 2, 3, 4, 5])]))


def _unwritten(runner: FakeRunner) -> Batch:
    return Batch([Slice("a", [9], 5, [0, 2])])


def _foreign(runner: FakeRunner) -> Batch:
    step(runner, Slice("b", [7, 7, 7, 7], 0, [3]), Slice("b", [8, 7, 7, 7, 7], 0, [4, 5]))
    return Batch([Slice("a", [9], 5, [3, 5])])  # both halves were written, by different sequences


def _other_tokens(runner: FakeRunner) -> Batch:
    return Batch([Slice("a", [9], 4, [0, 1], [spec([1, 2, 3, 5, 9])])])


def _short(runner: FakeRunner) -> Batch:
    return Batch([Slice("a", [9], 4, [0])])


def _outside(runner: FakeRunner) -> Batch:
    return Batch([Slice("a", [9], 4, [0, 8])])


def _empty(runner: FakeRunner) -> Batch:
    return Batch([Slice("a", [], 4, [0, 1])])


def _both_write(runner: FakeRunner) -> Batch:
    return Batch([Slice("a", [9], 4, [0, 1]), Slice("b", [9], 4, [0, 1])])


def _writes_what_is_read(runner: FakeRunner) -> Batch:
    return Batch([Slice("a", [9], 4, [0, 1]), Slice("b", [4], 3, [0])])


def _wrong_position(runner: FakeRunner) -> Batch:
    return Batch([Slice("a", [9], 4, [0, 1], [SampleSpec(0, GREEDY, 1, [1, 2, 3, 4, 9], [])])])


@pytest.mark.parametrize(
    "mistake",
    [
        _unwritten,
        _foreign,
        _other_tokens,
        _short,
        _outside,
        _empty,
        _both_write,
        _writes_what_is_read,
        _wrong_position,
    ],
)
def test_mistakes_are_found(runner: FakeRunner, mistake: object) -> None:
    step(runner, Slice("a", [1, 2, 3, 4], 0, [0]))
    assert callable(mistake)
    batch = mistake(runner)
    with pytest.raises(InternalError):
        runner.run(batch)


def test_reading_side_by_side_is_fine(runner: FakeRunner) -> None:
    runner.warm_up()
    step(runner, Slice("a", [1, 2, 3, 4], 0, [0]))
    step(runner, Slice("a", [9], 4, [0, 1]), Slice("b", [8], 4, [0, 2]))
    assert len(runner.batches) == 2
    assert (runner.batches[1].num_tokens, runner.batches[1].slices[0].end) == (2, 5)


def test_drafts_are_drawn_as_if_one_by_one(runner: FakeRunner) -> None:
    prompt = [1, 2, 3]
    first = runner.expected(prompt, 0, 0, 0)
    second = runner.expected([*prompt, first], 0, 0, 1)
    third = runner.expected([*prompt, first, second], 0, 0, 2)
    step(runner, Slice("a", prompt, 0, [3, 5]))
    for drafts, want in (([second, 7], [second, third]), ([7, third], [second])):
        specs = [spec(prompt, [first, *drafts[:i]]) for i in range(3)]
        output = step(runner, Slice("a", [first, *drafts], 3, [3, 5], specs, drafts=2))
        assert [item.token_id for item in output.samples[0]] == want
