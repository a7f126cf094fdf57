"""Drafts in the scheduler: fewer steps, the same tokens, and no trace of those that were not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from decode_scheduling import EOS, Driver, Knowing, Seen, make_record, undisturbed

from decode_service.metrics import StepMetrics
from decode_service.speculation.config import SpeculationConfig
from decode_service.speculation.proposer import NOTHING, Ask, Draft
from tandem.record import FinishReason, Record, Speculation
from tandem.service.metrics import Metrics


def with_drafts(
    record: Record, right: Callable[[Ask], int] | int, most: int = 5, *, truth: Seen | None = None, **driver: object
) -> Driver:
    """The record alone, with a proposer that is right so far. Returns after the end."""
    told = truth or undisturbed(record)
    count = right if callable(right) else lambda ask: right
    proposer = Knowing(lambda key: told.output(key.output), count)
    run = Driver(speculation=SpeculationConfig([proposer], max_tokens=most, fixed=True), **driver)  # type: ignore[arg-type]
    run.admit("r", record)
    run.run()
    run.assert_empty()
    return run


def decode_steps(driver: Driver) -> int:
    return sum(all(part.num_known == 1 for part in batch.slices) for batch in driver.runner.batches)


@pytest.mark.parametrize("right", [0, 1, 3, 5])
def test_tokens_are_the_same_and_steps_fewer(right: int) -> None:
    record = make_record(9, max_tokens=25, logprobs=2)
    alone = undisturbed(record)
    driver = with_drafts(make_record(9, max_tokens=25, logprobs=2), right, truth=alone)
    assert driver.seen["r"].output(0) == alone.output(0)
    assert driver.seen["r"].logprobs == {0: 25}
    assert driver.seen["r"].finished == alone.finished
    assert decode_steps(driver) == -(-24 // (right + 1))


def test_the_figures_tell_what_was_drafted_and_kept() -> None:
    driver = with_drafts(make_record(9, max_tokens=25), 2)
    seen, counts = driver.seen["r"], driver.scheduler.speculator.counts["knowing"]
    assert (counts.drafts, counts.accepted_tokens, counts.accepted_at[:3]) == (8, 16, [8, 8, 0])
    assert (seen.drafted, seen.accepted) == (counts.draft_tokens, 16)
    assert counts.draft_tokens > 16
    assert counts.lost_seconds > 0


def test_an_output_ends_in_the_middle_of_a_draft() -> None:
    record = make_record(6, max_tokens=64, ignore_eos=False, seed=3)
    alone = undisturbed(record)
    assert alone.finished == {0: FinishReason.STOP}
    wanted = alone.output(0)
    beyond = [*wanted, *undisturbed(make_record([*record.prompt, *wanted], max_tokens=8, seed=3)).output(0)]
    told = Seen(tokens={0: dict(enumerate(beyond))})
    driver = with_drafts(make_record(6, max_tokens=64, ignore_eos=False, seed=3), 5, truth=told)
    assert driver.seen["r"].output(0) == wanted
    assert wanted[-1] == EOS
    assert driver.seen["r"].finished == alone.finished


def test_min_tokens_hold_within_a_draft() -> None:
    def record() -> Record:
        return make_record(6, max_tokens=64, ignore_eos=False, seed=3, min_tokens=40)

    alone = undisturbed(record())
    assert len(alone.output(0)) >= 40
    driver = with_drafts(record(), 5, truth=alone)
    assert driver.seen["r"].output(0) == alone.output(0)


def test_several_outputs_have_drafts_of_their_own() -> None:
    alone = undisturbed(make_record(7, max_tokens=12, n=3))
    driver = with_drafts(make_record(7, max_tokens=12, n=3), lambda ask: ask.key.output * 2, truth=alone)
    assert [driver.seen["r"].output(i) for i in range(3)] == [alone.output(i) for i in range(3)]
    assert decode_steps(driver) == 11


def test_cached_blocks_hold_no_draft_that_was_not_kept() -> None:
    """The second run of the same record reads what the first left in the cache: the fake engine proves every slot."""
    driver = with_drafts(make_record(9, max_tokens=25), 2)
    wanted = driver.seen["r"].output(0)
    prompt = [*make_record(9).prompt, *wanted]
    admitted = driver.admit("again", make_record(prompt, max_tokens=4))
    assert admitted.cached_tokens == (len(prompt) - 1) // 4 * 4
    driver.run()
    driver.assert_empty()


@pytest.mark.parametrize(
    ("limits", "drafts"),
    [({"max_step_tokens": 16}, [5, 5, 2, 0]), ({"max_step_tokens": 64, "max_drafts": 8}, [5, 3, 0, 0])],
)
def test_drafts_keep_to_the_rows_that_a_step_may_have(limits: dict[str, int], drafts: list[int]) -> None:
    """The oldest come first; the others have fewer, and the same tokens."""
    alone = [undisturbed(make_record(8, max_tokens=12, seed=seed)).output(0) for seed in range(4)]
    proposer = Knowing(lambda key: alone[int(key.request)], lambda ask: 5)
    driver = Driver(speculation=SpeculationConfig([proposer], max_tokens=5, fixed=True), **limits)
    for seed in range(4):
        driver.admit(str(seed), make_record(8, max_tokens=12, seed=seed))
    driver.run()
    assert [driver.seen[str(seed)].output(0) for seed in range(4)] == alone
    had = [[part.drafts for part in batch.slices] for batch in driver.runner.batches]
    assert drafts in had
    assert max(map(sum, had)) == sum(drafts)
    driver.assert_empty()


def test_drafts_give_way_when_blocks_run_short() -> None:
    """Two outputs that just fit without drafts: nobody is preempted for one, and the tokens are the same."""
    alone = [undisturbed(make_record(8, max_tokens=8, seed=seed)).output(0) for seed in range(2)]
    proposer = Knowing(lambda key: alone[int(key.request)], lambda ask: 5)
    driver = Driver(8, 4, speculation=SpeculationConfig([proposer], max_tokens=5, fixed=True), prefix_cache=False)
    for seed in range(2):
        driver.admit(str(seed), make_record(8, max_tokens=8, seed=seed))
    driver.run()
    assert [driver.seen[str(seed)].output(0) for seed in range(2)] == alone
    assert driver.scheduler.counters.preemptions == 0
    driver.assert_empty()


@pytest.mark.parametrize(
    ("options", "drafted"),
    [
        (Speculation(), True),
        (Speculation("knowing"), True),
        (Speculation("off"), False),
        (Speculation("ngram"), False),
        (Speculation("auto", 0), False),
    ],
)
def test_a_request_chooses(options: Speculation, drafted: bool) -> None:
    record = make_record(9, max_tokens=10)
    record.speculation = options
    assert (with_drafts(record, 5).seen["r"].drafted > 0) is drafted


def test_a_request_limits_its_drafts() -> None:
    record = make_record(9, max_tokens=20)
    record.speculation = Speculation("auto", 2)
    driver = with_drafts(record, 5)
    assert max(part.drafts for batch in driver.runner.batches for part in batch.slices) == 2


def test_a_proposer_that_fails_costs_only_its_drafts(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(ask: Ask) -> int:
        raise RuntimeError("no idea")

    driver = with_drafts(make_record(9, max_tokens=10), fail)
    assert len(driver.seen["r"].output(0)) == 10
    assert "a proposer failed" in "".join(capfd.readouterr())


def test_time_of_asking_is_told_although_nothing_is_verified() -> None:
    class Silent(Knowing):
        def propose(self, asks: Sequence[Ask]) -> list[Draft]:
            return [NOTHING for _ in asks]

    driver = Driver(speculation=SpeculationConfig([Silent(lambda key: [], lambda ask: 0)], max_tokens=5))
    metrics = Metrics("decode")
    told = StepMetrics(metrics)
    driver.admit("r", make_record(9, max_tokens=100))
    while driver.step() is not None:
        told.observe(driver.scheduler.load(), driver.scheduler)
    labels = {"role": "decode", "proposer": "knowing"}
    seconds = metrics.registry.get_sample_value("tandem_spec_decode_proposer_seconds_total", labels)
    assert seconds is not None
    assert seconds > 0


def test_a_failing_step_takes_drafts_with_it() -> None:
    alone = undisturbed(make_record(8, max_tokens=20)).output(0)
    proposer = Knowing(lambda key: alone, lambda ask: 5)
    driver = Driver(speculation=SpeculationConfig([proposer], max_tokens=5, fixed=True))
    driver.admit("r", make_record(8, max_tokens=20))
    driver.step()
    driver.runner.fail_next = True
    driver.step()
    assert driver.seen["r"].error is not None
    driver.assert_empty()
    assert not proposer.known
