"""Drawing tokens in Triton's interpreter: token for token what the reference of all samplers draws."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from kernels.sampling import ALL_BANNED, BAD_ID, NOT_FINITE, Draw, draw_reference
from kernels.triton.sampling import draw_tokens
from tandem.errors import InternalError
from tandem.record import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")
VOCABULARY = 700


@dataclass(frozen=True)
class Spec:
    """A draw's specification, as the engine's."""

    params: SamplingParams
    index: int = 0
    position: int = 0
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()
    logprobs: int | None = None


def rows(count: int, spread: float = 3.0, steps: float = 0.0) -> torch.Tensor:
    """Random logits; with `steps` rounded to its multiples, so that many are equal."""
    logits = torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(5)) * spread
    return (logits / steps).round() * steps if steps else logits


def same_as_reference(logits: torch.Tensor, specs: list[Spec]) -> list[int]:
    """Draw spec i from row i by both; return the tokens."""
    before = logits.clone()
    drawn = draw_tokens(logits, [Draw(row, spec) for row, spec in enumerate(specs)])
    for row, (actual, spec) in enumerate(zip(drawn, specs, strict=True)):
        expected = draw_reference(before[row].float(), spec)
        assert actual.token_id == expected.token_id, spec
        assert (actual.logprob is None) == (expected.logprob is None)
        assert actual.top_token_ids == expected.top_token_ids
        assert actual.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-4)
        if expected.logprob is not None:
            assert actual.logprob == pytest.approx(expected.logprob, abs=1e-4)
    return [result.token_id for result in drawn]


@pytest.mark.parametrize("steps", [0.0, 1.0])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.01),
        SamplingParams(temperature=1.5, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.3),
        SamplingParams(temperature=1.5, min_p=0.2),
        SamplingParams(temperature=1.2, top_k=20, top_p=0.7, min_p=0.01),
        SamplingParams(temperature=2.0, top_k=1),
        SamplingParams(temperature=1.0, top_k=VOCABULARY + 1, top_p=0.999),
    ],
)
def test_tokens_equal_the_reference(params: SamplingParams, steps: float) -> None:
    specs = [Spec(dataclasses.replace(params, seed=77 * i), index=i, position=i * 31) for i in range(6)]
    tokens = same_as_reference(rows(6, steps=steps), specs)
    assert params.temperature < 0.1 or params.top_k == 1 or len(set(tokens)) > 1


@pytest.mark.parametrize("banned", [(), (2,), tuple(range(0, VOCABULARY, 3))])
def test_banned_ids_leave_top_p_as_it_is(banned: tuple[int, ...]) -> None:
    params = SamplingParams(temperature=1.2, top_p=0.6)
    specs = [Spec(dataclasses.replace(params, seed=i), position=i, suppress=banned) for i in range(12)]
    same_as_reference(rows(12), specs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_16_bits(dtype: torch.dtype) -> None:
    same_as_reference(rows(4).to(dtype), [Spec(SamplingParams(seed=i, top_p=0.9)) for i in range(4)])


def test_log_probabilities_with_ties() -> None:
    specs = [Spec(SamplingParams(seed=3), logprobs=count) for count in (0, 1, 7)]
    same_as_reference(rows(3, steps=1.0), specs)


def test_penalties_biases_and_banned_ids() -> None:
    seen = {"prompt": (1, 2, 2, 3), "output": (3, 4, 4, 4)}
    logits = rows(6)
    logits[:, 4] = 9.0
    logits[:, 50] = -torch.inf
    same_as_reference(
        logits,
        [
            Spec(SamplingParams(temperature=0.0, repetition_penalty=1.5), **seen, logprobs=3),
            Spec(SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=1.9), **seen, logprobs=3),
            Spec(SamplingParams(seed=1, repetition_penalty=0.5, logit_bias={4: 30.0, 50: 100.0}), **seen, logprobs=5),
            Spec(SamplingParams(temperature=0.0), suppress=(4,), logprobs=2),
            Spec(SamplingParams(temperature=0.0, logit_bias={7: 1e39, 8: -1e39}), logprobs=2),
            Spec(SamplingParams(temperature=0.7, repetition_penalty=1.3), output=(4,), suppress=(9,), logprobs=1),
        ],
    )


def test_draws_that_cannot_be_done_fail_alone() -> None:
    logits = rows(6)
    logits[0, 5], logits[1, 600], logits[2] = torch.nan, torch.inf, -torch.inf
    specs = [Spec(SamplingParams(seed=2)) for _ in range(6)]
    specs[3] = Spec(SamplingParams(), suppress=(VOCABULARY,))
    specs[4] = Spec(SamplingParams(), suppress=tuple(range(VOCABULARY)))
    drawn = draw_tokens(logits.clone(), [Draw(row, spec) for row, spec in enumerate(specs)])
    assert [result.token_id for result in drawn[:5]] == [NOT_FINITE, NOT_FINITE, ALL_BANNED, BAD_ID, ALL_BANNED]
    assert drawn[5].token_id == draw_reference(logits[5], specs[5]).token_id


def test_wrong_draws_are_refused() -> None:
    with pytest.raises(InternalError, match=r"outside \[0, 2\)"):
        draw_tokens(rows(2), [Draw(2, Spec(SamplingParams()))])
    banned = Spec(SamplingParams(), suppress=(1,))
    with pytest.raises(InternalError, match="must not share rows"):
        draw_tokens(rows(2), [Draw(1, banned), Draw(1, banned)])
