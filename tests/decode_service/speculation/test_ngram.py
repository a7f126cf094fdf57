"""Prompt lookup: what it finds, against a naive search."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from decode_service.speculation import ngram
from decode_service.speculation.ngram import MAX_MATCH, NgramProposer, strength_of
from decode_service.speculation.proposer import STRENGTHS, Ask, Draft, OutputKey, chain_of
from tandem.record import SamplingParams

KEY = OutputKey("r", 0)


def ask(prompt: list[int], output: list[int], limit: int = 4, key: OutputKey = KEY) -> Ask:
    return Ask(key, prompt, output, limit, SamplingParams())


def naive(tokens: list[int]) -> tuple[int, int]:
    """(length of the longest earlier match of the end, newest place where it ends)."""
    best = (0, -1)
    for place in range(len(tokens) - 1):
        length = 0
        while length < min(MAX_MATCH, place + 1) and tokens[place - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        best = max(best, (length, place))
    return best


def test_follows_the_longest_match() -> None:
    draft = NgramProposer().propose([ask([1, 2, 3, 9, 9, 2, 3, 8, 8, 1], [2, 3])])[0]
    assert list(draft.token_ids) == [9, 9, 2, 3]
    assert draft.strength == strength_of(3)


def test_one_token_alone_is_the_weakest_match() -> None:
    assert NgramProposer().propose([ask([1, 2, 3, 4, 2, 9], [2], limit=1)])[0] == Draft([9])
    assert NgramProposer().propose([ask([1, 2, 3, 4, 2, 9], [7])])[0] == Draft()


def test_a_draft_past_the_end_repeats() -> None:
    assert list(NgramProposer().propose([ask([5, 6, 5, 6], [5], limit=5)])[0].token_ids) == [6, 5, 6, 5, 6]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=25))
def test_finds_what_a_naive_search_finds_while_the_output_grows(prompt: list[int], output: list[int]) -> None:
    proposer = NgramProposer()
    for end in range(1, len(output) + 1):
        tokens = [*prompt, *output[:end]]
        draft = proposer.propose([ask(prompt, output[:end], limit=1)])[0]
        length, place = naive(tokens)
        if length < 1:
            assert not draft.token_ids
        elif len(tokens) <= ngram.MAX_PLACES:  # else older places are left out
            assert list(draft.token_ids) == [tokens[place + 1]]
            assert draft.strength == strength_of(length)


def test_a_long_prompt_is_indexed_over_several_calls(monkeypatch: object) -> None:
    monkeypatch.setattr(ngram, "MAX_INDEXED", 10)  # type: ignore[attr-defined]
    proposer, prompt = NgramProposer(), [*range(25), 3]
    answers = [proposer.propose([ask(prompt, [4], limit=2)])[0] for _ in range(3)]
    assert [list(answer.token_ids) for answer in answers] == [[], [], [5, 6]]


def test_forgets_what_has_finished() -> None:
    proposer = NgramProposer()
    proposer.propose([ask([1, 2, 1], [2])])
    proposer.finished(KEY)
    proposer.finished(KEY)
    assert list(proposer.propose([ask([7, 8, 7], [8], limit=1)])[0].token_ids) == [7]


def test_strengths_rise_with_the_match() -> None:
    classes = [strength_of(length) for length in range(1, 60)]
    assert classes == sorted(classes)
    assert set(classes) == set(range(STRENGTHS))


def test_the_best_chain_of_a_tree_is_its_first_path() -> None:
    assert chain_of(Draft([10, 11, 20, 21, 30], parents=[-1, -1, 0, 1, 2])) == [10, 20, 30]
    assert chain_of(Draft([1, 2])) == [1, 2]
