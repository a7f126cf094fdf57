from __future__ import annotations

import pytest
from prefill_scheduling import EOS, Driver, expected_tokens, make_record

from engine.batch import StepOutput
from prefill_service.scheduler import Scheduler
from tandem.errors import (
    InternalError,
)
from tandem.record import FinishReason, OutputState


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 64])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 37])
def test_first_token_does_not_depend_on_the_chunk_size(chunk: int, length: int) -> None:
    driver = Driver(max_step_tokens=chunk)
    record = make_record(length, seed=3)
    driver.submit("a", record)
    steps = driver.run()
    assert steps == -(-length // chunk)
    assert driver.seen["a"].first_tokens == expected_tokens(record)
    assert driver.seen["a"].token_ends[-1] == length
    driver.release()
    driver.assert_empty()


def test_several_prompts_share_a_step_within_the_budget() -> None:
    driver = Driver(max_step_tokens=16)
    for i, length in enumerate([5, 6, 30]):
        driver.submit(f"p{i}", make_record(length, seed=i))
    batch = driver.step()
    assert [(part.request_id, len(part.token_ids)) for part in batch.slices] == [("p0", 5), ("p1", 6), ("p2", 5)]
    driver.run()
    assert all(batch.num_tokens <= 16 for batch in driver.runner.batches)
    assert driver.scheduler.load().sending_requests == 3
    driver.release()
    driver.assert_empty()


def test_max_sequences_bounds_who_prefills_at_once() -> None:
    driver = Driver(max_sequences=2, max_step_tokens=64)
    for i in range(5):
        driver.submit(f"p{i}", make_record(4, seed=i))
    batch = driver.step()
    assert len(batch.slices) == 2
    assert driver.run() == 2
    assert len([s for s in driver.seen.values() if s.deltas]) == 5


def test_each_chunk_is_announced_when_it_is_computed() -> None:
    driver = Driver(max_step_tokens=6)
    driver.submit("a", make_record(15))
    driver.step()
    assert driver.seen["a"].token_ends == [6]
    driver.step()
    assert driver.seen["a"].token_ends == [6, 12]
    assert driver.seen["a"].deltas is None
    driver.step()
    assert driver.seen["a"].token_ends == [6, 12, 15]
    assert driver.seen["a"].deltas is not None


def test_blocks_for_the_whole_prompt_are_reserved_at_the_start() -> None:
    driver = Driver(num_blocks=8, block_size=4, max_step_tokens=4)
    driver.submit("a", make_record(20, seed=1))
    driver.submit("b", make_record(16, seed=2))
    driver.step()
    assert driver.pool.num_free == 3
    assert len(driver.seen["a"].started.blocks) == 5
    assert driver.run() == 4
    assert driver.seen["b"].started is None, "b's four blocks aren't free while a holds five of eight"
    driver.release("a")
    driver.run()
    assert driver.seen["b"].deltas is not None


def test_nobody_overtakes_one_that_waits_for_blocks() -> None:
    driver = Driver(num_blocks=8, block_size=4, max_step_tokens=64)
    driver.submit("a", make_record(20, seed=1))
    driver.step()
    driver.submit("long", make_record(24, seed=2))
    driver.submit("short", make_record(4, seed=3))
    assert driver.step() is None
    driver.release("a")
    batch = driver.step()
    assert [part.request_id for part in batch.slices] == ["long", "short"]


def test_prefix_hits_are_not_computed_again() -> None:
    driver = Driver(max_step_tokens=64)
    driver.submit("a", make_record(30, seed=1))
    driver.run()
    driver.release("a")
    longer = [*make_record(30, seed=1).prompt[:21], 5, 6, 7, 8]
    admission = driver.submit("b", make_record(longer, seed=9))
    assert admission.cached_tokens == 20
    batch = driver.step()
    assert (batch.slices[0].start, len(batch.slices[0].token_ids)) == (20, 5)
    assert driver.seen["b"].started.cached_tokens == driver.seen["b"].started.ready_tokens == 20
    assert driver.seen["b"].first_tokens == expected_tokens(make_record(longer, seed=9))
    assert driver.scheduler.counters.cached_tokens == 20


@pytest.mark.parametrize("still_held", [False, True])
def test_whole_prompt_cached_computes_the_last_token_on_a_copy(still_held: bool) -> None:
    driver = Driver(num_blocks=16, block_size=4)
    record = make_record(12, seed=1)
    driver.submit("a", record)
    driver.run()
    if not still_held:
        driver.release("a")
    assert driver.submit("b", record).cached_tokens == 11
    batch = driver.step()
    assert (batch.slices[0].start, len(batch.slices[0].token_ids), len(batch.copies)) == (11, 1, 1)
    started = driver.seen["b"].started
    assert (started.cached_tokens, started.ready_tokens) == (11, 8)
    assert driver.seen["b"].first_tokens == driver.seen["a"].first_tokens
    driver.release()
    driver.assert_empty()


def test_a_cached_prompt_as_large_as_the_pool_still_runs() -> None:
    driver = Driver(num_blocks=3, block_size=4)
    record = make_record(12, seed=1)
    driver.submit("a", record)
    driver.run()
    driver.release("a")
    driver.submit("b", record)
    batch = driver.step()
    assert (batch.slices[0].start, batch.copies) == (8, [])
    assert driver.seen["b"].first_tokens == driver.seen["a"].first_tokens


def test_prefixes_of_tenants_are_apart() -> None:
    driver = Driver()
    driver.submit("a", make_record(30, seed=1, tenant="x"))
    driver.run()
    assert driver.submit("b", make_record(30, seed=1, tenant="y")).cached_tokens == 0
    assert driver.submit("c", make_record(30, seed=1, tenant="x")).cached_tokens == 28


def test_prefixes_of_cache_scopes_are_apart() -> None:
    driver = Driver()
    driver.submit("a", make_record(30, seed=1, cache_scope="x"))
    driver.run()
    assert driver.submit("b", make_record(30, seed=1, cache_scope="y")).cached_tokens == 0
    assert driver.submit("c", make_record(30, seed=1, cache_scope="x")).cached_tokens == 28


def test_without_a_prefix_cache_everything_is_computed() -> None:
    driver = Driver(prefix_cache=False, max_step_tokens=64)
    for key in ("a", "b"):
        driver.submit(key, make_record(12, seed=1))
        assert driver.step().num_tokens == 12
    assert driver.scheduler.counters.cached_tokens == 0


def test_priority_then_arrival() -> None:
    driver = Driver(max_step_tokens=4, aging_seconds=1000.0)
    for key, priority in [("late", 5), ("first", 0), ("second", 0), ("urgent", -1)]:
        driver.submit(key, make_record(4, seed=priority, priority=priority))
    order = [driver.step().slices[0].request_id for _ in range(4)]
    assert order == ["urgent", "first", "second", "late"]


def test_an_urgent_newcomer_takes_the_next_chunk() -> None:
    driver = Driver(max_step_tokens=4)
    driver.submit("long", make_record(40, seed=1))
    driver.step()
    driver.submit("urgent", make_record(4, seed=2, priority=-50))
    assert [part.request_id for part in driver.step().slices] == ["urgent"]
    assert [part.request_id for part in driver.step().slices] == ["long"]


@pytest.mark.parametrize("priority", [1, 2**31 - 1])
def test_waiting_outweighs_priority_in_the_end(priority: int) -> None:
    driver = Driver(max_step_tokens=4, aging_seconds=0.1, num_blocks=512)
    driver.submit("patient", make_record(4, seed=1, priority=priority))
    for i in range(100):
        driver.submit(f"u{i}", make_record(4, seed=i + 2, priority=0))
        driver.step()
        driver.release(f"u{i}")
        if driver.seen["patient"].deltas is not None:
            break
    assert driver.seen["patient"].deltas is not None


def test_n_first_tokens_come_from_one_row() -> None:
    driver = Driver()
    record = make_record(9, seed=5, n=4, logprobs=2)
    driver.submit("a", record)
    batch = driver.step()
    assert len(batch.slices) == 1
    assert driver.seen["a"].first_tokens == expected_tokens(record)
    assert [delta.position for delta in driver.seen["a"].deltas] == [0] * 4
    assert all(len(delta.logprobs[0].top_token_ids) == 2 for delta in driver.seen["a"].deltas)
    assert driver.scheduler.counters.generated_tokens == 4


def test_a_record_with_outputs_continues_behind_them() -> None:
    driver = Driver()
    record = make_record(9, seed=5, outputs=[[7, 8, 9]])
    driver.submit("a", record)
    driver.run()
    delta = driver.seen["a"].deltas[0]
    assert (delta.index, delta.position, delta.token_ids[0]) == (0, 3, expected_tokens(record)[0])
    assert driver.seen["a"].token_ends[-1] == 12


def test_only_outputs_without_a_token_get_a_first_one() -> None:
    driver = Driver()
    record = make_record(9, seed=5, n=3, outputs=[[4], [], [5, 6]])
    driver.submit("a", record)
    driver.run()
    assert driver.seen["a"].first_tokens == expected_tokens(record)
    assert list(driver.seen["a"].first_tokens) == [1]
    driver.submit("none", make_record(9, seed=6, n=2, outputs=[[4], [5]]))
    driver.run()
    assert driver.seen["none"].deltas == []


def test_finished_outputs_get_no_token() -> None:
    driver = Driver()
    record = make_record(9, seed=5, n=2)
    record.outputs[0] = OutputState([], finish_reason=FinishReason.CANCELLED)
    driver.submit("a", record)
    driver.run()
    assert list(driver.seen["a"].first_tokens) == [1]


@pytest.mark.parametrize(
    ("stopping", "banned"),
    [
        ({"min_tokens": 1}, {EOS}),
        ({"min_tokens": 1, "stop_token_ids": (9, 4)}, {EOS, 4, 9}),
        ({"min_tokens": 1, "stop_token_ids": (9,), "ignore_eos": True}, {9}),
        ({"stop_token_ids": (9,)}, set()),
    ],
)
def test_stop_ids_are_banned_below_min_tokens(stopping: dict, banned: set[int]) -> None:
    driver = Driver()
    driver.submit("a", make_record(5, **stopping))
    batch = driver.step()
    assert set(batch.slices[0].samples[0].suppress) == banned
    assert batch.slices[0].samples[0].suppress == tuple(sorted(banned))


def test_cancel_while_waiting_prefilling_and_sent() -> None:
    driver = Driver(max_step_tokens=4, max_sequences=1)
    for i in range(3):
        driver.submit(f"p{i}", make_record(8, seed=i))
    driver.step()
    driver.release("p0", "p2")
    assert driver.scheduler.counters.cancelled == 2
    driver.run()
    assert driver.seen["p1"].deltas is not None
    driver.release("p1")
    assert driver.scheduler.counters.cancelled == 2, "a finished request isn't cancelled"
    driver.assert_empty()
    driver.release("p1")
    driver.assert_empty()


def test_cancel_during_a_step_frees_after_it() -> None:
    driver = Driver(num_blocks=8, block_size=4, max_step_tokens=4)
    driver.submit("a", make_record(20, seed=1))
    batch = driver.schedule()
    driver.release("a")
    assert driver.pool.num_free == 3, "the launched step still writes into the blocks"
    driver.finish(batch)
    driver.assert_empty()
    assert driver.seen["a"].token_ends == []


def test_cancel_during_a_failing_step() -> None:
    driver = Driver()
    driver.submit("a", make_record(20, seed=1))
    driver.schedule()
    driver.release("a")
    assert driver.scheduler.fail_step(InternalError("fire")) == []
    driver.assert_empty()


def test_steps_after_a_cancel_are_counted() -> None:
    driver = Driver(max_step_tokens=4)
    driver.submit("a", make_record(20, seed=1))
    driver.step()
    posted = driver.scheduler.steps
    driver.step()
    driver.scheduler.release("a", posted)
    assert driver.scheduler.counters.worst_steps_after_cancel == 1
    assert driver.scheduler.counters.steps_after_cancel == 1


def test_a_failed_step_fails_only_those_aboard() -> None:
    driver = Driver(max_step_tokens=8, max_sequences=1)
    driver.submit("a", make_record(20, seed=1))
    driver.submit("b", make_record(8, seed=2))
    driver.schedule()
    driver.take(driver.scheduler.fail_step(InternalError("fire")))
    assert driver.seen["a"].error is not None
    driver.scheduler.check_integrity()
    assert driver.pool.num_free == 64 - 5, "blocks stay until the request is released: somebody may be reading them"
    driver.run()
    assert driver.seen["b"].deltas is not None
    driver.release()
    driver.assert_empty()


def test_one_bad_row_fails_one_request() -> None:
    driver = Driver(max_step_tokens=64)
    driver.submit("bad", make_record(5, seed=1))
    driver.submit("good", make_record(5, seed=2))
    batch = driver.schedule()
    output = driver.runner.run(batch)
    output.samples[0] = []
    output.errors[0] = InternalError("NaN")
    driver.take(driver.scheduler.update(batch, output))
    assert driver.seen["bad"].error is not None
    assert driver.seen["good"].deltas is not None
    driver.release()
    driver.assert_empty()


def test_an_update_that_fails_leaves_nobody_behind() -> None:
    driver = Driver(max_step_tokens=64)
    for i in range(3):
        driver.submit(f"p{i}", make_record(5, seed=i))
    batch = driver.schedule()
    driver.release("p2")
    output = StepOutput([*driver.runner.run(batch).samples[:1], [], []])
    with pytest.raises(ValueError, match="argument"):
        driver.scheduler.update(batch, output)
    driver.take(driver.scheduler.fail_all(InternalError("bug")))
    assert driver.seen["p1"].error is not None
    driver.release()
    driver.assert_empty()


def test_fail_all_covers_who_waits() -> None:
    driver = Driver(max_sequences=1, max_step_tokens=4)
    for i in range(3):
        driver.submit(f"p{i}", make_record(8, seed=i))
    driver.schedule()
    driver.take(driver.scheduler.fail_all(InternalError("bug")))
    assert all(seen.error is not None for seen in driver.seen.values())
    assert driver.schedule() is None
    driver.release()
    driver.assert_empty()


def test_load_counts_tokens_that_are_still_to_compute() -> None:
    driver = Driver(max_step_tokens=8, max_sequences=1)
    driver.submit("a", make_record(20, seed=1))
    driver.submit("b", make_record(9, seed=2))
    driver.step()
    load = driver.scheduler.load()
    assert (load.running_requests, load.waiting_requests, load.queued_prefill_tokens) == (1, 1, 21)
    assert (load.free_blocks, load.total_blocks) == (59, 64)


def test_our_own_bugs_are_loud() -> None:
    driver = Driver()
    driver.submit("a", make_record(40))
    with pytest.raises(InternalError, match="already"):
        driver.submit("a", make_record(4))
    batch = driver.schedule()
    with pytest.raises(InternalError, match="under way"):
        driver.scheduler.schedule()
    driver.finish(batch)
    with pytest.raises(InternalError, match="launched"):
        driver.scheduler.update(batch, StepOutput([[]]))
    driver.scheduler._queued_tokens += 1
    with pytest.raises(AssertionError, match="miscounted"):
        driver.scheduler.check_integrity()


def test_the_default_clock_orders_by_arrival() -> None:
    driver = Driver(max_step_tokens=4)
    scheduler = Scheduler(driver.scheduler.config, driver.pool)
    scheduler.submit("a", make_record(4, seed=1))
    scheduler.submit("b", make_record(4, seed=2))
    _, batch = scheduler.schedule()
    assert [part.request_id for part in batch.slices] == ["a"]
