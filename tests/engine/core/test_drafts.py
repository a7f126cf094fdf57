"""Rows of drafts: each is drawn as if the drafts before it had been drawn one by one; behind a wrong one nothing
counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from engine.batch import Batch, SampledToken, SampleSpec, Slice, StepOutput
from engine.loading import Engine
from engine.models.meta import NOT_PICKED, Predictions
from engine.runner import Runner
from engine.sampler import greedy_rows, sample
from kernels import dispatch
from kernels.sampling import NOT_FINITE
from tandem.record import SamplingParams

MakeEngine = Callable[..., Engine]
PROMPT = [5, 17, 3, 99, 200, 41, 8, 8, 150, 7, 12]
GREEDY = SamplingParams(temperature=0.0)
SETTINGS = [
    GREEDY,
    SamplingParams(temperature=1.1, top_p=0.95, seed=12),
    SamplingParams(temperature=0.9, seed=5, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.7),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, logit_bias={7: 4.0}),
]


def spec(params: SamplingParams, output: Sequence[int], logprobs: int | None = 3) -> SampleSpec:
    banned = (3, 4) if len(output) < 4 else ()  # as with min_tokens
    return SampleSpec(1, params, len(output), PROMPT, list(output), suppress=banned, logprobs=logprobs)


def drafted(params: SamplingParams, output: list[int], drafts: list[int], table: list[int]) -> Slice:
    specs = [spec(params, [*output, *drafts[:i]]) for i in range(len(drafts) + 1)]
    return Slice("r", [output[-1], *drafts], len(PROMPT) + len(output) - 1, table, specs, drafts=len(drafts))


def plain(runner: Runner, params: SamplingParams, count: int) -> list[SampledToken]:
    table, done = list(range(8)), list[SampledToken]()
    done += runner.run(Batch([Slice("r", PROMPT, 0, table, [spec(params, [])])])).samples[0]
    while len(done) < count:
        ids = [item.token_id for item in done]
        part = Slice("r", ids[-1:], len(PROMPT) + len(ids) - 1, table, [spec(params, ids)])
        done += runner.run(Batch([part])).samples[0]
    return done


@pytest.mark.parametrize("params", SETTINGS, ids=["greedy", "sampled", "penalties", "greedy-edited"])
@pytest.mark.parametrize("right", [0, 1, 3, 6])
def test_drafts_change_no_bit(make_engine: MakeEngine, params: SamplingParams, right: int) -> None:
    """Tokens and log probabilities are those of steps of one row, also beside others, and over what was refused."""
    with dispatch.forced("cpp"):
        runner = make_engine().runner
        want = plain(runner, params, 14)
        table, ids = list(range(20, 28)), [item.token_id for item in want]
        done = list(runner.run(Batch([Slice("r", PROMPT, 0, table, [spec(params, [])])])).samples[0])
        other = Slice("other", [9, 9, 9], 0, [30], [spec(GREEDY, [])])
        while len(done) < len(want):
            rest = ids[len(done) :]
            drafts = [*rest[:right], *((token + 1) % 250 for token in rest[right:])][: min(6, len(rest) - 1)]
            output = runner.run(Batch([other, drafted(params, ids[: len(done)], drafts, table), other]))
            assert len(output.samples[1]) == min(right, len(drafts)) + 1
            done += output.samples[1]
        assert done == want


def test_greedy_rows_of_drafts_are_marked_each() -> None:
    edited = replace(spec(GREEDY, []), suppress=(1,), logprobs=None)
    bare = replace(edited, suppress=())
    batch = Batch(
        [
            Slice("a", [1, 2], 0, [0], [edited, bare], drafts=1),
            Slice("b", [1], 0, [1]),
            Slice("c", [1, 2, 3], 0, [2], [bare]),
        ]
    )
    marks = greedy_rows(batch)
    assert marks is not None
    assert marks.tolist() == [0, 1, 1]


def drawn(best: list[int], drafts: list[int]) -> StepOutput:
    """One slice whose rows' largest logits are `best`."""
    specs = [replace(spec(GREEDY, [0] * 5), logprobs=None) for _ in best]
    batch = Batch([Slice("r", [1, *drafts], 0, [0], specs, drafts=len(drafts))])
    return sample(batch, Predictions(torch.zeros(len(best), 8), torch.tensor(best)))


def test_nothing_behind_a_wrong_draft_counts() -> None:
    assert [item.token_id for item in drawn([4, 5, 6, 7], [4, 9, 6]).samples[0]] == [4, 5]
    assert [item.token_id for item in drawn([4, 5, 6, 7], [4, 5, 6]).samples[0]] == [4, 5, 6, 7]
    assert [item.token_id for item in drawn([4, 5, NOT_FINITE], [9, 5]).samples[0]] == [4]


def test_a_row_that_fails_ends_the_request_only_when_it_is_drawn_alone() -> None:
    output = drawn([4, 5, NOT_FINITE], [4, 5])
    assert [item.token_id for item in output.samples[0]] == [4, 5]
    assert not output.errors
    output = drawn([NOT_FINITE, 5], [4])
    assert output.samples == [[]]
    assert list(output.errors) == [0]


def test_picked_and_drawn_rows_mix() -> None:
    edited = replace(spec(SamplingParams(temperature=0.0, logit_bias={2: 9.0}), [0] * 5), logprobs=None)
    batch = Batch([Slice("r", [1, 2], 0, [0], [edited, replace(edited, params=GREEDY)], drafts=1)])
    output = sample(batch, Predictions(torch.zeros(2, 8), torch.tensor([NOT_PICKED, 6])))
    assert [item.token_id for item in output.samples[0]] == [2, 6]
