"""Drawing tokens: against the numpy reference, and bit for bit in any company."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.batch import SampleSpec
from kernels.sampling import ALL_BANNED, BAD_ID, NOT_FINITE, SKIPPED, Draw, Drawn, draw_reference, draw_tokens
from tandem.errors import InternalError
from tandem.record import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def draw(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[Drawn]:
    """One draw per row."""
    return draw_tokens(logits, [Draw(row, spec) for row, spec in enumerate(specs)])


def tokens(row: Sequence[float], params: SamplingParams, count: int = 1, **spec: object) -> list[int]:
    """`count` draws at positions 0, 1, ... from one row."""
    logits = torch.tensor([row], dtype=torch.float32)
    wanted = [Draw(0, SampleSpec(0, params, position, **spec)) for position in range(count)]  # type: ignore[arg-type]
    return [drawn.token_id for drawn in draw_tokens(logits, wanted)]


PARAMS = [
    SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, seed=77)
    for t, k, p, m in itertools.product((0.3, 1.0, 5.0), (0, 1, 40), (1.0, 0.9, 0.3), (0.0, 0.05))
] + [
    GREEDY,
    SamplingParams(temperature=1e-310, seed=1),
    SamplingParams(temperature=100.0, seed=2, top_p=0.999999),
    SamplingParams(top_k=10**9, seed=3),
    SamplingParams(top_k=3000, top_p=0.95, seed=4),
    SamplingParams(top_p=1e-12, seed=5),
    SamplingParams(min_p=1.0, seed=6),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.25, seed=7),
    SamplingParams(repetition_penalty=0.01, temperature=0.0),
    SamplingParams(repetition_penalty=1e-300, temperature=0.7, seed=8),
    SamplingParams(logit_bias={0: 100.0, 1: -100.0, 14: 3.5}, seed=9),
    SamplingParams(seed=2**64 - 1),
]


def random_rows(vocabulary: int, rows: int, spread: float = 3.0) -> torch.Tensor:
    """Rows of random logits; every second is coarse, so that many are equal."""
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * spread
    logits[1::2] = logits[1::2].round()
    return logits


@pytest.mark.parametrize("vocabulary", [15, 16, 17, 63, 64, 65, 257, 1031, 9000])
def test_cpp_equals_the_reference(vocabulary: int) -> None:
    rows = random_rows(vocabulary, len(PARAMS))
    specs = [
        SampleSpec(i % 3, params, i, prompt=[1, 5, 5], output=[2, 5, 2, 7], suppress=(3,) * (i % 2), logprobs=i % 4)
        for i, params in enumerate(PARAMS)
    ]
    for i, (got, spec) in enumerate(zip(draw(rows, specs), specs, strict=True)):
        want = draw_reference(rows[i], spec)
        assert (got.token_id, got.top_token_ids) == (want.token_id, want.top_token_ids), spec
        assert got.logprob == pytest.approx(want.logprob, abs=2e-5, rel=2e-6)
        assert got.top_logprobs == pytest.approx(want.top_logprobs, abs=2e-5, rel=2e-6)


def test_real_vocabulary_flat_and_peaked() -> None:
    """Large nuclei and large k take other paths than small ones."""
    logits = torch.cat([random_rows(49152, 2, 1.0), random_rows(49152, 2, 4.0)])
    settings = [(0, 0.9), (0, 0.5), (20_000, 1.0), (20_000, 0.9), (3_000, 1.0), (50, 0.9), (0, 1.0)]
    for row, (k, p), temperature in itertools.product(range(4), settings, (0.7, 1.5)):
        spec = SampleSpec(0, SamplingParams(temperature=temperature, top_k=k, top_p=p, seed=row), k)
        (got,) = draw_tokens(logits, [Draw(row, spec)])
        assert got.token_id == draw_reference(logits[row], spec).token_id


@pytest.mark.parametrize("threads", [1, 2])
def test_a_draw_is_the_same_in_any_company(threads: int, implementation: str) -> None:
    torch.set_num_threads(threads)
    specs = [
        SampleSpec(i % 2, params, 3 * i, prompt=[4, 2], output=[9], logprobs=3 if i % 3 else None)
        for i, params in enumerate(PARAMS)
    ]
    rows = random_rows(997, len(specs))
    together = draw(rows, specs)
    order = list(reversed(range(len(specs))))
    shuffled = draw_tokens(rows, [Draw(i, specs[i]) for i in order] * 2)
    assert [shuffled[order.index(i)] for i in range(len(specs))] == together
    assert shuffled[: len(specs)] == shuffled[len(specs) :]
    for i, spec in enumerate(specs):
        assert draw_tokens(rows[i : i + 1], [Draw(0, spec)]) == [together[i]]


def test_noise_depends_on_seed_index_and_position() -> None:
    flat = torch.zeros(1, 1000)
    base = SampleSpec(0, SamplingParams(seed=5), 3)
    others = [base, replace(base, index=1), replace(base, position=4), replace(base, params=SamplingParams(seed=6))]
    drawn = [item.token_id for item in draw_tokens(flat, [Draw(0, spec) for spec in [*others, base]])]
    assert drawn[0] == drawn[4]
    assert len(set(drawn)) == 4


def test_ties_take_the_lowest_id(implementation: str) -> None:
    assert tokens([0, 3, 1, 3, 3], GREEDY) == [1]
    assert tokens([0.0, -0.0], GREEDY) == [0]
    assert tokens([0.0] * 200 + [1.0] * 200, GREEDY) == [200]
    assert set(tokens([0, 2, 2, 2, 2], SamplingParams(top_k=2), 200)) == {1, 2}
    assert set(tokens([0, 2, 2, 2, 2], SamplingParams(top_p=0.4), 200)) == {1, 2}
    assert set(tokens([1.0] * 500, SamplingParams(top_p=0.05), 2000)) == set(range(25))


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(), {0, 1, 2, 3, 4}),
        (SamplingParams(top_k=3), {1, 2, 4}),
        (SamplingParams(top_p=0.55), {2, 4}),  # 0.4 + 0.25
        (SamplingParams(top_p=0.4 - 1e-6), {2}),
        (SamplingParams(top_p=0.7), {1, 2, 4}),
        (SamplingParams(top_k=3, top_p=0.7), {2, 4}),  # 0.65 of the 0.85 that top-k left
        (SamplingParams(min_p=0.4), {1, 2, 4}),  # at least 0.16
        (SamplingParams(min_p=0.4, top_p=0.55), {2, 4}),
        (SamplingParams(top_p=1e-9), {2}),
        (SamplingParams(min_p=1.0), {2}),
    ],
)
def test_truncation_keeps_exactly(params: SamplingParams, kept: set[int], implementation: str) -> None:
    row = np.log([0.05, 0.2, 0.4, 0.1, 0.25]).tolist()
    assert set(tokens(row, params, 400)) == kept


def test_truncation_comes_after_temperature(implementation: str) -> None:
    row = np.log([0.05, 0.2, 0.4, 0.1, 0.25]).tolist()
    assert set(tokens(row, SamplingParams(top_p=0.55, temperature=0.25), 400)) == {2}
    assert set(tokens(row, SamplingParams(top_p=0.55, temperature=4.0), 400)) == {1, 2, 4}


def test_penalties_bias_and_bans_in_log_probabilities(implementation: str) -> None:
    row = [2.0, -1.0, 0.5, 1.0, 3.0, 0.0]
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={3: 1.5, 2: -1.0},
    )
    spec = SampleSpec(0, params, 3, prompt=[0, 1, 1], output=[2, 1, 2], suppress=(4,), logprobs=6)
    edited = np.array([2.0 / 2, -1.0 * 2 - 0.5 - 0.25, 0.5 / 2 - 0.5 - 0.5 - 1.0, 1.0 + 1.5, -np.inf, 0.0])
    want = edited - np.log(np.exp(edited).sum())
    (got,) = draw(torch.tensor([row]), [spec])
    assert got.token_id == 3
    assert got.top_token_ids == (3, 0, 5, 2, 1, 4)
    assert got.logprob == pytest.approx(want[3], abs=1e-6)
    assert got.top_logprobs == pytest.approx(tuple(want[list(got.top_token_ids)]), abs=1e-6)


def test_log_probabilities_are_those_before_temperature_and_truncation(implementation: str) -> None:
    row = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    spec = SampleSpec(0, SamplingParams(temperature=0.2, top_k=2, seed=3), 0, logprobs=4)
    (got,) = draw(row, [spec])
    want = torch.log_softmax(row[0].double(), 0)
    assert got.logprob == pytest.approx(float(want[got.token_id]), abs=1e-6)
    values, ids = want.topk(4)
    assert got.top_token_ids == tuple(ids.tolist())
    assert got.top_logprobs == pytest.approx(tuple(values.tolist()), abs=1e-6)


def test_penalties_only_touch_the_row_they_are_for() -> None:
    """Counts live in a scratch area that the next draw of the thread uses too."""
    rows = random_rows(100, 1).repeat(3, 1)
    plain = SampleSpec(0, replace(GREEDY, presence_penalty=1e-30), 0, logprobs=5)
    heavy = replace(plain, params=replace(GREEDY, repetition_penalty=1.9), prompt=list(range(100)), output=[1] * 9)
    first, _, third = draw(rows, [plain, heavy, plain])
    assert first == third


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 5, 99])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.5)])
def test_bad_logits_fail_alone(value: float, place: int, params: SamplingParams, implementation: str) -> None:
    rows = random_rows(100, 3)
    good = draw(rows, [SampleSpec(0, params, 0)] * 3)
    rows[1, place] = value
    assert draw(rows, [SampleSpec(0, params, 0)] * 3) == [good[0], Drawn(NOT_FINITE), good[2]]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=3), SamplingParams(top_k=4, temperature=1e5, seed=4)])
def test_what_the_model_rules_out_stays_out(params: SamplingParams, implementation: str) -> None:
    """Neither penalties nor a bias bring a logit of -inf back, not even as the smallest finite number."""
    row = torch.tensor([[-np.inf, 1.0, -np.inf, 0.0, -np.inf]], dtype=torch.float32)
    edits = {"repetition_penalty": 1e-300, "frequency_penalty": -2.0, "logit_bias": {2: 100.0, 4: -100.0}}
    spec = SampleSpec(0, replace(params, **edits), 0, prompt=[0, 4], output=[0], logprobs=5)  # type: ignore[arg-type]
    (got,) = draw(row, [spec])
    assert got.token_id in (1, 3)
    assert got.top_token_ids == (1, 3, 0, 2, 4)
    assert got.top_logprobs[2:] == (-np.inf,) * 3
    everything = replace(spec, prompt=[0, 1, 2, 3, 4], suppress=(1, 3))
    assert draw(row, [everything])[0].token_id == ALL_BANNED


@pytest.mark.parametrize("bad", [-1, 50, 2**31, 2**40])
def test_bad_ids_fail_alone(bad: int, implementation: str) -> None:
    rows = random_rows(50, 5)
    specs = [
        SampleSpec(0, SamplingParams(repetition_penalty=1.1), 0, prompt=[bad]),
        SampleSpec(0, SamplingParams(presence_penalty=1.0), 0, output=[1, bad]),
        SampleSpec(0, SamplingParams(logit_bias={bad: 1.0}), 0),
        SampleSpec(0, GREEDY, 0, suppress=(bad,)),
        SampleSpec(0, GREEDY, 0, prompt=[bad]),  # read by nobody: no penalties
    ]
    drawn = [item.token_id for item in draw(rows, specs)]
    assert drawn == [BAD_ID] * 4 + [int(rows[4].argmax())]


def test_everything_banned(implementation: str) -> None:
    assert tokens([1, 2, 3], SamplingParams(), suppress=(0, 1, 2)) == [ALL_BANNED]
    assert set(tokens([1, 2, 3], SamplingParams(), 50, suppress=(0, 2))) == {1}


def test_bad_rows_are_our_bug() -> None:
    for row in (-1, 2):
        with pytest.raises(InternalError, match="row outside"):
            draw_tokens(torch.zeros(2, 5), [Draw(row, SampleSpec(0, GREEDY, 0))])
    assert draw_tokens(torch.zeros(0, 5), []) == []


@pytest.mark.parametrize("params", [PARAMS[2], SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, seed=7)])
@pytest.mark.parametrize("wrong", [0, 2, 5])
def test_a_run_draws_what_each_draws_alone_until_one_is_not_as_expected(params: SamplingParams, wrong: int) -> None:
    """Two runs side by side; in the first, what lies behind the wrong one is skipped, or drawn for nothing."""
    rows, output = random_rows(257, 12), [3, 9, 9]
    specs = [SampleSpec(0, params, 3 + i, prompt=[1, 5, 5], output=[*output, *range(i)]) for i in range(6)] * 2
    alone = [drawn.token_id for drawn in draw(rows, specs)]
    expected = [*(token if i != wrong else token + 1 for i, token in enumerate(alone[:6])), *alone[6:]]
    runs = [Draw(i, spec, i % 6 > 0, expected[i]) for i, spec in enumerate(specs)]
    got = [drawn.token_id for drawn in draw_tokens(rows, runs)]
    assert got[: wrong + 1] == alone[: wrong + 1]
    assert all(token in (SKIPPED, alone[i]) for i, token in enumerate(got[:6]))
    assert got[6:] == alone[6:]
