"""Drafts from past outputs: against a reference that looks at every place, within bounds, and within one scope."""

from __future__ import annotations

import tracemalloc
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from decode_scheduling import Driver, make_record
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_service.speculation import suffix
from decode_service.speculation.config import SpeculationConfig
from decode_service.speculation.proposer import NOTHING, Ask, Draft, OutputKey
from decode_service.speculation.suffix import MAX_MATCH, MIN_MATCH, PastOutputs, SuffixProposer
from decode_service.speculation.suffix_tree import NODE_BYTES, SuffixTree
from tandem.record import SamplingParams

ALL = 1 << 30


@dataclass
class Naive:
    """Every place of every text, counted anew for each question. Places are (text, position)."""

    depth: int
    texts: dict[int, list[int]] = field(default_factory=dict)
    places: list[tuple[int, int]] = field(default_factory=list)

    def after(self, tokens: Sequence[int]) -> tuple[int, float] | None:
        """The commonest next token, of equals the latest, and its share; None when there is none."""
        ends = [place for place in self.places if self.window(place)[: len(tokens)] == list(tokens)]
        following: dict[int, list[tuple[int, int]]] = {}
        for place in ends:
            if len(window := self.window(place)) > len(tokens):
                following.setdefault(window[len(tokens)], []).append(place)
        if not following:
            return None
        token = max(following, key=lambda one: (len(following[one]), following[one][-1]))
        return token, len(following[token]) / len(ends)

    def window(self, place: tuple[int, int]) -> list[int]:
        text, position = place
        return self.texts[text][position : position + self.depth]


texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(texts=texts, depth=st.integers(2, 6), kept=st.integers(0, 40), questions=st.lists(st.lists(st.integers(0, 2))))
def test_a_tree_counts_as_the_reference_does(
    texts: list[list[int]], depth: int, kept: int, questions: list[list[int]]
) -> None:
    """Places are added in order; the oldest are removed while more than `kept` are there."""
    live: dict[int, array[int]] = {}
    naive, tree = Naive(depth), SuffixTree(depth, live)
    root = tree.root()
    for number, text in enumerate(texts):
        live[number], naive.texts[number] = array("I", text), text
        for position in range(len(text)):
            tree.add(root, number, position)
            naive.places.append((number, position))
            if len(naive.places) > kept:
                tree.remove(root, *naive.places.pop(0))
            tree.check()
        for gone in set(live) - {place[0] for place in naive.places}:
            live[gone] = array("I")  # nothing may name it any more
        for question in [*questions, text[-3:]]:
            place = tree.walk(root, array("I", question))
            found = tree.likeliest(place) if place is not None else None
            if question:
                assert (found[:2] if found else None) == naive.after(question)
    for one in naive.places:
        tree.remove(root, *one)
    assert tree.is_empty(root)
    assert tree.nodes == 1


def test_of_equals_the_latest_is_taken_also_after_others_were_forgotten() -> None:
    live = {n: array("I", text) for n, text in enumerate([[1, 2, 9], [1, 2, 8], [1, 2, 9], [1, 2, 8], [1, 2, 7]])}
    tree = SuffixTree(4, live)
    root = tree.root()

    def next_token() -> tuple[int, float]:
        place = tree.walk(root, array("I", [1, 2]))
        assert place is not None
        found = tree.likeliest(place)
        assert found is not None
        return found[:2]

    for number, want in enumerate([(9, 1.0), (8, 0.5), (9, 2 / 3), (8, 0.5), (8, 0.4)]):
        tree.add(root, number, 0)
        assert next_token() == want
    tree.remove(root, 0, 0)
    tree.remove(root, 1, 0)
    assert next_token() == (7, 1 / 3)


def remembered(*outputs: Sequence[int], scope: str = "", max_bytes: int = suffix.DEFAULT_BYTES) -> PastOutputs:
    past = PastOutputs(max_bytes)
    for output in outputs:
        past.learn(scope, output)
        past.work(ALL)
    return past


def test_the_longest_match_decides() -> None:
    past = remembered([5, 1, 2, 3, 4], [6, 1, 2, 3, 7], [8, 1, 2, 3, 7])
    assert past.following("", [9, 1, 2, 3], 1) == ([7], 3, 2 / 3)
    assert past.following("", [5, 1, 2, 3], 1) == ([4], 4, 1.0)
    assert past.following("", [3], 1) == ([], 0, 0.0)  # too short to say much
    assert past.following("", [3, 9], 1) == ([], 0, 0.0)


def test_a_draft_ends_where_it_has_become_unlikely() -> None:
    outputs = [[1, 2, 3 + i, 50 + i, 60 + i] for i in range(6)] + [[1, 2, 3, 40, 41 + i] for i in range(9)]
    past = remembered(*outputs)
    ids, matched, share = past.following("", [1, 2], 8)
    assert ids == [3, 40]  # 10 of 15, then 9 of 10, then 1 of 9 of these
    assert (matched, share) == (2, pytest.approx(10 / 15))


def test_a_draft_goes_on_beyond_the_depth_of_the_tree() -> None:
    text = list(range(100, 400))
    past = remembered(text)
    assert past.following("", text[50:66], 64)[0] == text[66:130]
    assert past.following("", text[-MIN_MATCH - 1 : -1], 64)[0] == text[-1:]


def test_scopes_see_nothing_of_each_other() -> None:
    past = remembered([1, 2, 3, 4], scope="a")
    past.learn("b", [1, 2, 9, 9])
    past.work(ALL)
    assert past.following("a", [1, 2], 2)[0] == [3, 4]
    assert past.following("b", [1, 2], 2)[0] == [9, 9]
    assert past.following("c", [1, 2], 2)[0] == []


def test_work_is_done_a_few_places_at_a_time() -> None:
    past = PastOutputs()
    past.learn("", list(range(20)))
    past.work(5)
    assert past.following("", [3, 4], 2)[0] == [5, 6]
    assert past.following("", [9, 10], 2)[0] == [11, 12] or past.tree.nodes == 6
    before = past.tree.nodes
    past.work(5)
    assert past.tree.nodes == before + 5
    past.work(ALL)
    assert past.following("", [9, 10], 2)[0] == [11, 12]


def test_the_oldest_output_is_forgotten_first() -> None:
    outputs = [[1000 * i + j for j in range(50)] for i in range(12)]
    past = remembered(*outputs, max_bytes=500 * (NODE_BYTES + 4))
    known = [bool(past.following("", output[10:14], 1)[0]) for output in outputs]
    assert known == sorted(known)
    assert known[-5:] == [True] * 5
    assert not known[0]
    past.tree.check()


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 3), max_size=60)), max_size=40),
    steps=st.integers(1, 30),
)
def test_memory_stays_within_its_bound(outputs: list[tuple[str, list[int]]], steps: int) -> None:
    past = PastOutputs(max_bytes=100 * (NODE_BYTES + 4))
    for scope, output in outputs:
        past.learn(scope, output)
        past.work(steps)
        past.tree.check()
        assert past.tree.nodes <= past.max_nodes
        assert past.nbytes <= 1.4 * past.max_nodes * (NODE_BYTES + 4)
    past.work(ALL)
    assert past.texts > 0 or not any(len(output) > MIN_MATCH for _, output in outputs)


def test_memory_stays_within_its_bound_where_outputs_come_faster_than_they_are_learned() -> None:
    """What waits too long is dropped, but never a text that is in the tree in part."""
    past = PastOutputs(max_bytes=800 * (NODE_BYTES + 4))
    for number in range(200):
        past.learn("ab"[number % 2], [1000 * number + place for place in range(90)])
        past.work(40)
        assert past.tree.nodes <= past.max_nodes
        assert past.nbytes <= 1.1 * past.max_nodes * (NODE_BYTES + 4)
    past.work(ALL)
    past.tree.check()
    assert past.following("b", [1000 * 199 + 10, 1000 * 199 + 11], 1)[0] == [1000 * 199 + 12]


def test_forgetting_takes_a_few_places_at_a_time_too() -> None:
    """Equal outputs have few nodes and many tokens: to make room for one more, a whole one has to go."""
    past = PastOutputs(max_bytes=1000 * (NODE_BYTES + 4))
    output = list(range(120))
    for _ in range(8):
        past.learn("", output)
        past.work(ALL)
    oldest = past._texts[0]
    past.learn("", output)
    past.work(5)
    assert oldest.removed == 5
    past.work(ALL)
    assert past._texts[0] is not oldest
    assert past.following("", [7, 8], 2)[0] == [9, 10]


def test_a_node_takes_no_more_than_is_counted_for_it() -> None:
    """Text without a repetition, the worst case for rows; and again after everything was forgotten once."""
    budget = 20_000 * (NODE_BYTES + 4)
    tracemalloc.start()
    try:
        past = PastOutputs(max_bytes=budget)
        for i in range(60):
            past.learn("", [7919 * (1000 * i + j) % 49_157 for j in range(1000)])
            past.work(ALL)
        assert past.tree.nodes > 0.9 * past.max_nodes
        assert tracemalloc.get_traced_memory()[0] < 1.1 * budget
    finally:
        tracemalloc.stop()


def ask(key: OutputKey, prompt: Sequence[int], output: Sequence[int], scope: str = "", limit: int = 4) -> Ask:
    return Ask(key, prompt, output, limit, SamplingParams(), scope)


def test_a_finished_output_is_proposed_to_the_next_one() -> None:
    proposer, first, second = SuffixProposer(), OutputKey("a", 0), OutputKey("b", 0)
    prompt = list(range(40, 70))
    assert proposer.propose([ask(first, prompt, [1])]) == [NOTHING]
    proposer.observe(first, [2, 3], 0)
    assert proposer.propose([ask(first, prompt, [1, 2, 3])]) == [NOTHING]
    proposer.observe(first, [4], 0)
    proposer.finished(first)
    (draft,) = proposer.propose([ask(second, prompt, [1])])
    assert draft == Draft([2, 3, 4], strength=6)  # 16 tokens match, with the prompt's
    (other,) = proposer.propose([ask(OutputKey("c", 0), prompt, [1], scope="other")])
    assert other == NOTHING
    proposer.finished(OutputKey("unknown", 3))


def test_only_outputs_that_asked_are_learned() -> None:
    """Of others the scope isn't known."""
    proposer = SuffixProposer()
    proposer.observe(OutputKey("a", 0), [1, 2, 3, 4], 0)
    proposer.finished(OutputKey("a", 0))
    proposer.past.work(ALL)
    assert proposer.past.texts == 0


def test_a_long_output_is_learned_over_many_steps() -> None:
    proposer, key = SuffixProposer(), OutputKey("a", 0)
    output = list(range(10 * suffix.PLACES_A_STEP))
    proposer.propose([ask(key, [], output)])
    proposer.finished(key)
    for _ in range(3):
        proposer.propose([])
    assert proposer.past.tree.nodes == 3 * suffix.PLACES_A_STEP + 1
    assert MAX_MATCH < suffix.DEPTH


def test_an_answer_that_was_given_before_takes_fewer_steps_but_not_for_another_tenant() -> None:
    """Through the scheduler: the same request three times, the last from another cache scope."""
    driver = Driver(speculation=SpeculationConfig([SuffixProposer()], max_tokens=7, fixed=True))
    steps, outputs = [], []
    for number, scope in enumerate(["tenant a", "tenant a", "tenant b"]):
        driver.admit(str(number), make_record(9, max_tokens=25, cache_scope=scope))
        steps.append(driver.run())
        outputs.append(driver.seen[str(number)].output(0))
    assert outputs[0] == outputs[1] == outputs[2]
    assert steps[0] == steps[2] >= 25
    assert steps[1] <= 6
    driver.assert_empty()
