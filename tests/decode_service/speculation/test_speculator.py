"""Which drafts are verified: adaptively, with probes that keep what was measured from growing old."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from decode_service.speculation.config import SpeculationConfig
from decode_service.speculation.costs import StepCosts
from decode_service.speculation.ngram import NgramProposer
from decode_service.speculation.proposer import Ask, Draft, OutputKey
from decode_service.speculation.registry import speculation
from decode_service.speculation.speculator import PROBE_STEPS, Speculator, Want
from decode_service.speculation.suffix import SuffixProposer
from tandem.errors import ConfigError
from tandem.record import SamplingParams, Speculation

KEY = OutputKey("r", 0)


class Steady:
    """Drafts that are right with their first `right` tokens; the truth is always 1."""

    def __init__(self, name: str = "steady", *, cheap: bool = True, right: int = 4) -> None:
        self.name, self.cheap, self.right = name, cheap, right
        self.asked: list[int] = []

    def propose(self, asks: Sequence[Ask]) -> list[Draft]:
        self.asked += [ask.limit for ask in asks]
        return [Draft([*[1] * self.right, *[2] * ask.limit][: ask.limit]) for ask in asks]

    def observe(self, key: OutputKey, tokens: Sequence[int], accepted: int) -> None:
        pass

    def finished(self, key: OutputKey) -> None:
        pass


def speculator(*proposers: Steady, slope: float = 0.02, most: int = 8) -> Speculator:
    costs = StepCosts({1: 1.0, 101: 1.0 + 100 * slope})
    return Speculator(SpeculationConfig(proposers, max_tokens=most), vocab_size=10, costs=costs)


def step(spec: Speculator, slope: float, mode: str = "auto", outputs: int = 1) -> int:
    """One step of one output, maybe beside others that want nothing; returns the drafts that were verified."""
    wants = [Want(Ask(KEY, [5], [1], spec.most, SamplingParams()), Speculation(mode))] if spec.wants(KEY) else []
    drafts = [*spec.drafts(wants, outputs=outputs, rows=outputs), []][0]
    accepted = next((i for i, token in enumerate(drafts) if token != 1), len(drafts))
    assert spec.saw(KEY, [1] * (accepted + 1), drafts) == accepted
    spec.timed(outputs, len(drafts), 0, 1.0 + slope * (outputs - 1 + len(drafts)))
    return len(drafts)


def test_drafts_are_as_long_as_they_are_right() -> None:
    spec = speculator(Steady(right=4))
    taken = [step(spec, 0.02) for _ in range(100)]
    # Places 2 and 3, 4 to 7 are measured together: the length is where the chance falls.
    assert set(taken[-20:]) <= {4, 5}


def test_wrong_drafts_stop_being_verified_and_come_back_when_they_are_right() -> None:
    proposer = Steady(right=0)
    spec = speculator(proposer, slope=0.1)
    wrong = [step(spec, 0.1) for _ in range(100)]
    assert sum(wrong[20:]) == 0
    proposer.right = 8
    right = [step(spec, 0.1) for _ in range(60)]
    assert right[-1] == 8, "being right was noticed without verifying"


def test_drafts_that_cost_too_much_are_not_verified_but_their_cost_is_looked_at_again() -> None:
    spec = speculator(Steady(right=8), slope=2.0)
    dear = [step(spec, 2.0) for _ in range(6 * PROBE_STEPS)]
    assert 3 <= sum(count > 0 for count in dear) <= 12
    cheap = [step(spec, 0.01) for _ in range(3 * PROBE_STEPS)]
    assert cheap[-1] > 0


@pytest.mark.parametrize(("outputs", "asked"), [(1, 80), (2, 40), (16, 10)])
def test_outputs_whose_drafts_are_no_good_are_asked_for_rarely(outputs: int, asked: int) -> None:
    """In company: for one alone it costs little."""
    proposer = Steady(right=0)
    spec = speculator(proposer, slope=0.5)
    for _ in range(200):
        step(spec, 0.5, outputs=outputs)
    before = len(proposer.asked)
    for _ in range(80):
        step(spec, 0.5, outputs=outputs)
    assert len(proposer.asked) - before == asked


def test_a_step_without_drafts_is_measured_now_and_then() -> None:
    spec = speculator(Steady(right=8))
    taken = [step(spec, 0.02) for _ in range(4 * PROBE_STEPS)]
    assert 2 <= taken[20:].count(0) <= 5


def test_a_costly_proposer_is_asked_for_as_much_as_pays() -> None:
    proposer = Steady(cheap=False, right=2)
    spec = speculator(proposer)
    for _ in range(100):
        step(spec, 0.05)
    assert set(proposer.asked[-20:]) <= {2, 3}
    proposer.right = 0
    asked = len(proposer.asked)
    for _ in range(4 * PROBE_STEPS):
        step(spec, 0.05)
    assert len(proposer.asked) - asked < 120


def test_a_costly_proposer_that_has_to_catch_up_is_asked_again_soon() -> None:
    proposer = Steady(cheap=False, right=0)
    spec = speculator(proposer, slope=0.5)
    for _ in range(2 * PROBE_STEPS):
        step(spec, 0.5)
    propose, asked = proposer.propose, len(proposer.asked)
    proposer.propose = lambda asks: [Draft() for _ in propose(asks)]  # type: ignore[method-assign]
    for _ in range(16 * PROBE_STEPS):  # of which it rests seven in eight
        step(spec, 0.5)
    assert len(proposer.asked) - asked > 8


def test_the_better_draft_wins_and_a_request_may_name_one() -> None:
    spec = speculator(Steady("good", right=8), Steady("bad", right=0))
    for _ in range(60):
        step(spec, 0.02)
    before = {name: counts.draft_tokens for name, counts in spec.counts.items()}
    for _ in range(20):
        step(spec, 0.02)
    assert spec.counts["good"].draft_tokens > before["good"]
    assert spec.counts["bad"].draft_tokens == before["bad"]
    assert step(spec, 0.02, "bad") == 0
    assert spec.limit(Speculation("bad", 3)) == 3
    assert spec.limit(Speculation("nobody")) == 0


def test_a_proposer_that_fails_is_left_alone_ever_longer_until_it_is_well() -> None:
    """What it costs to fail, and to say so, is not paid at every step."""

    class Failing(Steady):
        ill = True

        def propose(self, asks: Sequence[Ask]) -> list[Draft]:
            drafts = super().propose(asks)
            if self.ill:
                raise RuntimeError("out of memory")
            return drafts

    proposer = Failing()
    spec = speculator(proposer)
    asked = []
    for at in range(40):
        before = len(proposer.asked)
        step(spec, 0.02)
        asked += [at] if len(proposer.asked) > before else []
    assert asked == [0, 2, 5, 10, 19, 36]
    proposer.ill = False
    assert [step(spec, 0.02) > 0 for _ in range(40)].count(True) > 5


def test_a_step_whose_figures_were_lost_leaves_nothing_behind() -> None:
    """An error between its tokens and its time: the next step may have no drafts."""
    spec = speculator(Steady(right=0))
    spec.drafts([Want(Ask(KEY, [5], [1], 2, SamplingParams()), Speculation())] if spec.wants(KEY) else [], 1, 1)
    spec.saw(KEY, [1], [2, 2])
    spec.timed(1, 0, 0, 1.0)
    spec.timed(1, 2, 0, 1.1)
    assert spec.counts["steady"].lost_seconds == 0


def test_flags_name_proposers() -> None:
    ngram, suffix = speculation("auto", 4).proposers
    assert isinstance(ngram, NgramProposer)
    assert isinstance(suffix, SuffixProposer)
    assert speculation("off", 4).proposers == []
    assert [each.name for each in speculation("ngram, ngram", 4).proposers] == ["ngram"]
    with pytest.raises(
        ConfigError, match="--speculation: 'magic' is not one of auto, off, ngram, suffix, draft, self, eagle"
    ):
        speculation("ngram,magic", 4)
    with pytest.raises(ConfigError, match="--speculation-tokens: must be 1 to 64, got 0"):
        speculation("auto", 0)


def test_proposers_with_a_model_are_there_when_their_flag_is() -> None:
    assert speculation("auto", 4).models == []
    assert speculation("auto", 4, models={"self", "draft"}).models == ["draft", "self"]
    only = speculation("draft,ngram", 4, models={"draft"})
    assert ([each.name for each in only.proposers], only.models) == (["ngram"], ["draft"])
    assert speculation("off", 4, models={"draft"}).models == []
    with pytest.raises(ConfigError, match="--speculation: self needs --self-draft-layers"):
        speculation("self", 4, models={"draft"})
