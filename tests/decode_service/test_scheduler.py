"""The scheduler with a shadow engine: batching, reservation, preemption, hand-off, ends."""

from __future__ import annotations

import pytest
from decode_scheduling import EOS, VOCAB, Driver, make_record, undisturbed

from decode_service.config import SchedulerConfig
from tandem.errors import (
    ConfigError,
    IncompatibleError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    TandemError,
)
from tandem.record import FinishReason, OutputState, Record, SamplingParams, TokenDelta


def test_a_local_request_is_chunked_and_ends_at_max_tokens() -> None:
    driver = Driver(max_step_tokens=4)
    driver.admit("a", make_record(10, max_tokens=5))
    sizes = []
    while (batch := driver.step()) is not None:
        sizes.append([len(part.token_ids) for part in batch.slices])
    assert sizes == [[4], [4], [2], [1], [1], [1], [1]]
    assert driver.seen["a"].finished == {0: FinishReason.LENGTH}
    assert driver.seen["a"].tokens == undisturbed(make_record(10, max_tokens=5)).tokens
    driver.assert_empty()


def test_sequences_join_and_leave_at_any_step() -> None:
    driver = Driver()
    driver.admit("a", make_record(5, seed=1, max_tokens=12))
    driver.step()
    driver.step()
    driver.admit("b", make_record(6, seed=2, max_tokens=3))
    batch = driver.step()
    assert [part.request_id for part in batch.slices] == ["a", "b"]
    driver.run()
    for key, seed, most in (("a", 1, 12), ("b", 2, 3)):
        prompt = 5 if key == "a" else 6
        assert driver.seen[key].tokens == undisturbed(make_record(prompt, seed=seed, max_tokens=most)).tokens
    driver.assert_empty()


def test_a_long_local_prefill_does_not_stall_running_sequences() -> None:
    driver = Driver(num_blocks=256, max_step_tokens=64, mixed_prefill_tokens=8)
    driver.admit("a", make_record(4, seed=1, max_tokens=40))
    driver.step()
    driver.admit("long", make_record(200, seed=2, max_tokens=4))
    steps = 0
    while driver.scheduler.load().queued_prefill_tokens:
        batch = driver.step()
        if "a" not in driver.seen or driver.seen["a"].ended is None:
            assert batch.slices[0].request_id == "a", "a step without the running sequence"
            assert batch.num_tokens <= 9
        steps += 1
    assert steps >= 200 // 8
    driver.run()
    driver.assert_empty()


def test_n_outputs_share_the_prompt_and_copy_on_write() -> None:
    record = make_record(10, max_tokens=6, n=3, seed=5)
    driver = Driver(num_blocks=16)
    driver.admit("a", record)
    batch = driver.step()
    assert len(batch.slices) == 1
    assert [spec.index for spec in batch.slices[0].samples] == [0, 1, 2]
    used = 16 - driver.pool.num_free
    assert used == 3, "forks hold the prompt's blocks together"
    batch = driver.step()
    assert len({source for source, _ in batch.copies}) == 1, "each output writes into a copy of the partial block"
    driver.run()
    assert driver.seen["a"].tokens == undisturbed(record).tokens
    assert len({tuple(driver.seen["a"].output(i)) for i in range(3)}) == 3
    driver.assert_empty()


def test_remote_commit_streams_the_first_token_and_goes_on() -> None:
    record = make_record(10, max_tokens=6)
    expected = undisturbed(record).output(0)
    driver = Driver()
    admitted = driver.admit("a", make_record(10, max_tokens=6), local=False)
    assert (admitted.cached_tokens, admitted.needed_start, admitted.needed_end) == (0, 0, 10)
    assert len(admitted.blocks) == 3
    assert driver.step() is None
    assert driver.scheduler.load().receiving_requests == 1
    driver.receive(admitted, record, [[expected[0]]])
    assert driver.seen["a"].output(0) == expected[:1]
    assert [len(part.token_ids) for part in driver.step().slices] == [1]
    driver.run()
    assert driver.seen["a"].output(0) == expected
    driver.assert_empty()


def test_remote_commit_of_n_outputs_splits_at_once() -> None:
    record = make_record(9, max_tokens=5, n=3, seed=4)
    expected = undisturbed(record)
    driver = Driver()
    admitted = driver.admit("a", make_record(9, max_tokens=5, n=3, seed=4), local=False)
    driver.receive(admitted, record, [expected.output(i)[:1] for i in range(3)])
    assert len(driver.step().slices) == 3
    driver.run()
    assert driver.seen["a"].tokens == expected.tokens
    driver.assert_empty()


@pytest.mark.parametrize("n", [1, 2])
def test_a_commit_without_first_tokens_computes_the_last_prompt_token(n: int) -> None:
    record = make_record(8, max_tokens=4, n=n, seed=4)
    driver = Driver()
    admitted = driver.admit("a", make_record(8, max_tokens=4, n=n, seed=4), local=False)
    driver.receive(admitted, record, [[]] * n)
    batch = driver.step()
    assert [(part.start, len(part.token_ids), len(part.samples)) for part in batch.slices] == [(7, 1, n)]
    driver.run()
    assert driver.seen["a"].tokens == undisturbed(record).tokens
    driver.assert_empty()


def test_a_commit_that_ends_an_output_at_once() -> None:
    record = make_record(8, max_tokens=4, ignore_eos=False)
    driver = Driver()
    admitted = driver.admit("a", make_record(8, max_tokens=4, ignore_eos=False), local=False)
    driver.receive(admitted, record, [[EOS]])
    assert driver.seen["a"].finished == {0: FinishReason.STOP}
    assert driver.seen["a"].ended is not None
    driver.assert_empty()


def test_a_bad_commit_is_refused() -> None:
    driver = Driver()
    admitted = driver.admit("a", make_record(8), local=False)
    with pytest.raises(InvalidRequestError):
        driver.receive(admitted, make_record(8, n=2), [[1], [2]])
    with pytest.raises(InvalidRequestError):
        driver.receive(admitted, make_record(8), [[VOCAB]])
    with pytest.raises(NotFoundError):
        driver.scheduler.commit("other", make_record(8), 8)


def test_cached_prefix_is_not_needed_but_the_last_token_is() -> None:
    driver = Driver()
    driver.admit("a", make_record(12, max_tokens=1))
    driver.run()
    again = driver.admit("b", make_record(12, max_tokens=1), local=False)
    assert (again.needed_start, again.needed_end, len(again.blocks)) == (8, 12, 1)
    driver.scheduler.cancel("b")
    driver.scheduler.release("b")
    driver.admit("c", make_record(12, max_tokens=2))
    assert [(part.start, len(part.token_ids)) for part in driver.step().slices] == [(8, 4)]
    driver.run()
    assert driver.seen["c"].tokens == undisturbed(make_record(12, max_tokens=2)).tokens
    driver.assert_empty()


@pytest.mark.parametrize("field", ["tenant", "cache_scope"])
def test_prefixes_of_tenants_and_scopes_are_apart(field: str) -> None:
    driver = Driver(num_blocks=8, prefix_cache=True)
    first = driver.admit("a", make_record(12, **{field: "x"}), local=False)
    driver.receive(first, make_record(12, **{field: "x"}), [[3]])
    driver.run()
    for key, scope, needed in (("b", "y", 0), ("c", "", 0), ("d", "x", 8)):
        admitted = driver.admit(key, make_record(12, **{field: scope}), local=False)
        assert admitted.needed_start == needed
        driver.scheduler.cancel(key)
        driver.scheduler.release(key)
    driver.assert_empty()


def test_a_preempted_request_keeps_its_scope() -> None:
    driver = Driver(num_blocks=8)
    driver.admit("old", make_record(4, seed=1, max_tokens=20))
    record = make_record(4, seed=2, max_tokens=20, cache_scope="x")
    driver.admit("young", record)
    driver.run()
    assert driver.seen["young"].ended.preemptions > 0
    sequence = [*record.prompt, *driver.seen["young"].output(0)]
    for key, scope, found in (("b", "y", False), ("c", "x", True)):
        admitted = driver.admit(key, make_record(sequence, cache_scope=scope, max_tokens=1), local=False)
        assert (admitted.needed_start > 0) is found
        driver.scheduler.cancel(key)
        driver.scheduler.release(key)
    driver.assert_empty()


def test_received_blocks_are_cached_only_after_the_commit() -> None:
    driver = Driver()
    record = make_record(12)
    admitted = driver.admit("a", make_record(12), local=False)
    assert driver.pool.num_cached == 0
    driver.receive(admitted, record, [[3]])
    assert driver.pool.num_cached == 3


def test_decoded_blocks_enter_the_cache() -> None:
    driver = Driver()
    driver.admit("a", make_record(4, max_tokens=9))
    driver.run()
    assert driver.pool.num_cached == 3  # prompt 4, nine tokens, eight of them with KV
    driver.assert_empty()


def test_the_youngest_is_preempted_and_gives_the_same_tokens() -> None:
    driver = Driver(num_blocks=12, prefix_cache=False)
    for seed in range(3):
        driver.admit(f"k{seed}", make_record(10, seed=seed, max_tokens=20))
    driver.run()
    assert driver.scheduler.counters.preemptions > 0
    assert driver.seen["k0"].ended.preemptions == 0
    assert driver.seen["k2"].ended.preemptions > 0
    for seed in range(3):
        assert driver.seen[f"k{seed}"].tokens == undisturbed(make_record(10, seed=seed, max_tokens=20)).tokens
    driver.assert_empty()


def test_nothing_is_admitted_while_a_preempted_request_waits() -> None:
    driver = Driver(num_blocks=8, prefix_cache=False)
    driver.admit("a", make_record(8, seed=1, max_tokens=20))
    driver.admit("b", make_record(8, seed=2, max_tokens=20))
    while not driver.scheduler.load().waiting_requests:
        driver.step()
    with pytest.raises(OverloadedError) as caught:
        driver.admit("c", make_record(4, seed=3, max_tokens=1))
    assert caught.value.reason == "KV_PRESSURE"
    driver.run()
    driver.assert_empty()


def test_the_oldest_waits_for_blocks_in_receiving_and_preempts_after_the_commit() -> None:
    driver = Driver(num_blocks=8, prefix_cache=False)
    driver.admit("old", make_record(4, seed=1, max_tokens=26))
    driver.step()
    record = make_record(18, seed=2, max_tokens=6)
    admitted = driver.admit("young", make_record(18, seed=2, max_tokens=6), local=False)
    while driver.step() is not None:
        pass
    assert driver.seen["old"].ended is None, "it must be waiting for a block"
    driver.receive(admitted, record, [undisturbed(record).output(0)[:1]])
    driver.run()
    assert driver.seen["old"].ended.preemptions == 0
    assert driver.seen["young"].ended.preemptions > 0
    assert driver.seen["old"].tokens == undisturbed(make_record(4, seed=1, max_tokens=26)).tokens
    assert driver.seen["young"].tokens == undisturbed(record).tokens
    driver.assert_empty()


def test_receiving_is_capped_but_one_may_always() -> None:
    driver = Driver(num_blocks=20, block_size=4)
    driver.admit("big", make_record(40, seed=1, max_tokens=4), local=False)
    with pytest.raises(OverloadedError) as caught:
        driver.admit("second", make_record(4, seed=2, max_tokens=4), local=False)
    assert caught.value.reason == "RECEIVING_CAP"
    driver.admit("local", make_record(4, seed=3, max_tokens=4))
    driver.scheduler.check_integrity()


def test_what_exceeds_the_pool_is_refused_for_good() -> None:
    driver = Driver(num_blocks=8)
    with pytest.raises(OverloadedError) as caught:
        driver.admit("a", make_record(10, max_tokens=8, n=3))
    assert caught.value.reason == "EXCEEDS_POOL"
    assert caught.value.retry_after is None
    driver.assert_empty()


def test_what_does_not_fit_now_is_refused_for_now() -> None:
    driver = Driver(num_blocks=8)
    driver.admit("a", make_record(20, seed=1, max_tokens=4))
    with pytest.raises(OverloadedError) as caught:
        driver.admit("b", make_record(12, seed=2, max_tokens=4))
    assert caught.value.retry_after is not None
    driver.run()
    driver.admit("b", make_record(12, seed=2, max_tokens=4))
    driver.run()
    driver.assert_empty()


def test_sequences_are_limited() -> None:
    driver = Driver(max_sequences=3)
    driver.admit("a", make_record(4, seed=1, n=2))
    with pytest.raises(OverloadedError) as caught:
        driver.admit("b", make_record(4, seed=2, n=2))
    assert caught.value.reason == "MAX_SEQUENCES"
    with pytest.raises(OverloadedError) as caught:
        driver.admit("b", make_record(4, seed=2, n=4))
    assert caught.value.retry_after is None


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (make_record([], max_tokens=1), InvalidRequestError),
        (make_record(512), InvalidRequestError),
        (make_record([1, VOCAB]), InvalidRequestError),
        (make_record([1, -1]), InvalidRequestError),
        (make_record(4, max_tokens=0), InvalidRequestError),
        (make_record(4, n=2, outputs=[[1]]), InvalidRequestError),
        (make_record(4, outputs=[[VOCAB]]), InvalidRequestError),
        (make_record(4, max_tokens=2, outputs=[[1, 2, 3]]), InvalidRequestError),
    ],
)
def test_bad_records_are_refused(record: Record, error: type[TandemError]) -> None:
    driver = Driver()
    with pytest.raises(error):
        driver.admit("a", record)
    driver.assert_empty()


def test_another_model_and_a_used_key_are_refused() -> None:
    driver = Driver(model_id="m1")
    with pytest.raises(IncompatibleError):
        driver.admit("a", make_record(4, model_id="m2"))
    driver.admit("a", make_record(4, model_id="m1"))
    with pytest.raises(InvalidRequestError):
        driver.admit("a", make_record(4, model_id="m1"))


def test_config_names_the_bad_key() -> None:
    with pytest.raises(ConfigError, match="max_context"):
        SchedulerConfig(max_step_tokens=1, max_sequences=1, max_context=0, vocab_size=1)


def natural(record: Record) -> list[int]:
    """The tokens without any stop."""
    return undisturbed(record).output(0)


def test_stops_on_eos_stop_ids_and_context() -> None:
    free = natural(make_record(6, seed=9, max_tokens=30))
    stop = free[4]
    driver = Driver()
    driver.admit("stop", make_record(6, seed=9, max_tokens=30, stop_token_ids=(stop,)))
    driver.run()
    first = free.index(stop)
    assert driver.seen["stop"].output(0) == free[: first + 1]
    assert driver.seen["stop"].finished == {0: FinishReason.STOP}
    driver = Driver(max_context=12)
    driver.admit("context", make_record(6, seed=9, max_tokens=30))
    driver.run()
    assert driver.seen["context"].output(0) == free[:6]
    assert driver.seen["context"].finished == {0: FinishReason.LENGTH}


def test_eos_stops_unless_ignored_and_not_before_min_tokens() -> None:
    seed = next(s for s in range(200) if EOS in natural(make_record(6, seed=s, max_tokens=12))[:11])
    free = natural(make_record(6, seed=seed, max_tokens=12))
    place = free.index(EOS)
    driver = Driver()
    driver.admit("eos", make_record(6, seed=seed, max_tokens=12, ignore_eos=False))
    driver.admit("min", make_record(6, seed=seed, max_tokens=12, ignore_eos=False, min_tokens=place + 1))
    driver.run()
    assert driver.seen["eos"].output(0) == free[: place + 1]
    assert driver.seen["eos"].finished == {0: FinishReason.STOP}
    later = driver.seen["min"].output(0)
    assert later[:place] == free[:place]
    assert len(later) > place + 1 or later[place] != EOS
    driver.assert_empty()


def test_logprobs_travel_with_the_tokens() -> None:
    driver = Driver()
    driver.admit("a", make_record(6, max_tokens=5, logprobs=0))
    driver.run()
    assert driver.seen["a"].logprobs == {0: 5}


def test_finish_by_the_gateway() -> None:
    driver = Driver()
    driver.admit("a", make_record(6, max_tokens=20, n=2))
    driver.step()
    driver.step()
    driver.take(driver.scheduler.finish("a", 0))
    assert driver.seen["a"].finished == {0: FinishReason.STOP}
    assert driver.scheduler.finish("a", 0) == []
    assert driver.scheduler.finish("nobody", 0) == []
    with pytest.raises(InvalidRequestError):
        driver.scheduler.finish("a", 2)
    driver.run()
    assert driver.seen["a"].output(1) == undisturbed(make_record(6, max_tokens=20, n=2)).output(1)
    assert driver.seen["a"].ended is not None
    driver.assert_empty()


def test_finish_while_the_prompt_is_computed() -> None:
    driver = Driver(max_step_tokens=4)
    driver.admit("a", make_record(10, max_tokens=6, n=2))
    driver.step()
    driver.take(driver.scheduler.finish("a", 0))
    driver.run()
    assert driver.seen["a"].output(1) == undisturbed(make_record(10, max_tokens=6, n=2)).output(1)
    driver.assert_empty()


def test_finish_of_all_while_receiving_holds_the_blocks_until_release() -> None:
    driver = Driver()
    driver.admit("a", make_record(10), local=False)
    driver.take(driver.scheduler.finish("a", 0))
    assert driver.seen["a"].ended is not None
    assert driver.pool.num_free < driver.pool.num_blocks
    assert driver.scheduler.finish("a", 0) == []
    driver.scheduler.release("a")
    driver.assert_empty()


def test_cancel_costs_at_most_one_step() -> None:
    driver = Driver()
    driver.admit("a", make_record(6, max_tokens=20))
    driver.step()
    posted = driver.scheduler.steps
    driver.step()  # launched before the engine thread saw the cancel
    assert driver.scheduler.cancel("a", posted) is False
    assert driver.step() is None
    assert driver.scheduler.counters.worst_steps_after_cancel == 1
    assert driver.scheduler.cancel("a") is False
    driver.assert_empty()


def test_cancel_while_receiving_waits_for_the_copies() -> None:
    driver = Driver()
    admitted = driver.admit("a", make_record(10), local=False)
    assert driver.scheduler.cancel("a") is True
    assert driver.scheduler.cancel("a") is True
    assert driver.pool.num_free == driver.pool.num_blocks - 3
    with pytest.raises(NotFoundError):
        driver.scheduler.commit("a", make_record(10), admitted.needed_end)
    driver.scheduler.release("a")
    driver.scheduler.release("a")
    driver.assert_empty()


def test_retarget_to_local_forces_what_the_client_has() -> None:
    record = make_record(10, max_tokens=8)
    expected = undisturbed(record).output(0)
    driver = Driver()
    driver.admit("a", make_record(10, max_tokens=8), local=False)
    driver.take(driver.scheduler.start_local("a", [TokenDelta(0, 0, expected[:2])]))
    driver.run()
    seen = driver.seen["a"].tokens[0]
    assert seen == {position: expected[position] for position in range(2, 8)}, "forced tokens are not drawn again"
    driver.assert_empty()


def test_forced_tokens_win_over_other_draws() -> None:
    driver = Driver()
    driver.admit("a", make_record(10, max_tokens=4, logprobs=0), local=False)
    driver.scheduler.force("a", [TokenDelta(0, 0, [5])])
    driver.scheduler.force("a", [TokenDelta(0, 0, [6, 7])])
    driver.take(driver.scheduler.start_local("a"))
    driver.run()
    request = driver.seen["a"].tokens[0]
    assert sorted(request) == [2, 3]
    assert driver.scheduler.counters.generated_tokens == 2


def test_retarget_to_another_prefill_worker() -> None:
    record = make_record(10, max_tokens=8)
    expected = undisturbed(record).output(0)
    driver = Driver()
    admitted = driver.admit("a", make_record(10, max_tokens=8), local=False)
    driver.scheduler.force("a", [TokenDelta(0, 0, expected[:1])])
    driver.receive(admitted, record, [expected[:2]])
    driver.run()
    assert [driver.seen["a"].tokens[0][p] for p in range(1, 8)] == expected[1:]
    driver.assert_empty()


@pytest.mark.parametrize(
    "emitted", [[TokenDelta(3, 0, [1])], [TokenDelta(0, 2, [1])], [TokenDelta(0, 0, [VOCAB])]], ids=repr
)
def test_bad_emitted_tokens_are_refused(emitted: list[TokenDelta]) -> None:
    driver = Driver()
    driver.admit("a", make_record(10), local=False)
    with pytest.raises(InvalidRequestError):
        driver.scheduler.force("a", emitted)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("local", [True, False])
def test_a_migrated_record_goes_on_with_the_same_tokens(n: int, local: bool) -> None:
    whole = undisturbed(make_record(7, max_tokens=12, n=n, seed=3))
    have = [whole.output(i)[: 3 * i + 2] for i in range(n)]
    driver = Driver()
    record = make_record(7, max_tokens=12, n=n, seed=3, outputs=have)
    admitted = driver.admit("a", record, local=local)
    if not local:
        other = make_record(7, max_tokens=12, n=n, seed=3, outputs=have)
        assert admitted.needed_end == (7 + len(have[0]) if n == 1 else 7)
        firsts = [whole.output(0)[len(have[0]) :][:1]] if n == 1 else [[]] * n
        driver.receive(admitted, other, firsts)
    driver.run()
    for index in range(n):
        got = driver.seen["a"].tokens[index]
        assert [got[p] for p in sorted(got)] == whole.output(index)[len(have[index]) :]
    driver.assert_empty()


def test_a_migrated_record_with_one_output_still_empty() -> None:
    whole = undisturbed(make_record(7, max_tokens=6, n=2, seed=3))
    driver = Driver()
    driver.admit("a", make_record(7, max_tokens=6, n=2, seed=3, outputs=[whole.output(0)[:2], []]))
    driver.run()
    assert driver.seen["a"].output(1) == whole.output(1)
    assert [driver.seen["a"].tokens[0][p] for p in range(2, 6)] == whole.output(0)[2:]
    driver.assert_empty()


def test_finished_outputs_of_a_record_stay_finished() -> None:
    record = make_record(7, max_tokens=6, n=2)
    record.outputs[0] = OutputState([4, 5], finish_reason=FinishReason.STOP)
    driver = Driver()
    driver.admit("a", record)
    driver.run()
    assert 0 not in driver.seen["a"].tokens
    assert driver.seen["a"].finished == {1: FinishReason.LENGTH}
    driver.assert_empty()


def test_a_record_that_was_over_ends_at_once() -> None:
    driver = Driver()
    admitted = driver.admit("a", make_record(7, max_tokens=2, outputs=[[4, 5]]))
    assert admitted.blocks == []
    assert driver.seen["a"].finished == {0: FinishReason.LENGTH}
    assert driver.seen["a"].ended is not None
    driver.assert_empty()


def test_a_failing_step_fails_those_aboard_only() -> None:
    driver = Driver(num_blocks=64)
    driver.admit("a", make_record(4, seed=1))
    driver.admit("b", make_record(4, seed=2))
    waiting = driver.admit("c", make_record(9, seed=3), local=False)
    driver.runner.fail_next = True
    driver.step()
    assert isinstance(driver.seen["a"].error, TandemError)
    assert isinstance(driver.seen["b"].error, TandemError)
    expected = undisturbed(make_record(9, seed=3)).output(0)
    driver.receive(waiting, make_record(9, seed=3), [expected[:1]])
    driver.run()
    assert driver.seen["c"].output(0) == expected
    driver.assert_empty()


def test_a_bad_row_fails_its_request_only() -> None:
    driver = Driver()
    driver.admit("a", make_record(4, seed=1, n=2))
    driver.admit("b", make_record(4, seed=2))
    driver.step()
    driver.runner.bad_requests.add("a")
    driver.run()
    assert driver.seen["a"].error is not None
    assert driver.seen["b"].tokens == undisturbed(make_record(4, seed=2)).tokens
    driver.assert_empty()


def test_a_wrong_answer_is_our_bug_and_fail_all_clears_up() -> None:
    driver = Driver()
    driver.admit("a", make_record(4, seed=1))
    driver.admit("b", make_record(4, seed=2), local=False)
    driver.admit("c", make_record(4, seed=3), local=False)
    driver.scheduler.cancel("c")
    batch = driver.scheduler.schedule()
    output = driver.runner.run(batch)
    output.samples.append([])
    with pytest.raises(InternalError):
        driver.scheduler.update(batch, output)
    driver.take(driver.scheduler.fail_all(InternalError("bug")))
    assert driver.scheduler.keys() == ["b", "c"]
    assert "b" in driver.scheduler
    driver.scheduler.release("b")
    driver.scheduler.release("c")
    driver.assert_empty()


def test_finish_of_a_waiting_request_ends_it() -> None:
    driver = Driver(num_blocks=8, prefix_cache=False)
    driver.admit("a", make_record(8, seed=1, max_tokens=20))
    driver.admit("b", make_record(8, seed=2, max_tokens=20))
    while not driver.scheduler.load().waiting_requests:
        driver.step()
    assert driver.scheduler.load().queued_prefill_tokens > 0
    driver.take(driver.scheduler.finish("b", 0))
    driver.run()
    assert driver.seen["b"].ended.preemptions == 1
    driver.assert_empty()


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_the_oldest_waiting_request_takes_room_from_younger_ones(prefix_cache: bool) -> None:
    driver = Driver(num_blocks=13, prefix_cache=prefix_cache)
    scheduler = driver.scheduler
    waiting, young = make_record(20, seed=2, max_tokens=24), make_record(12, seed=3, max_tokens=24)
    driver.admit("old", make_record(4, seed=1, max_tokens=44))
    driver.admit("waiting", make_record(20, seed=2, max_tokens=24))
    admitted = driver.admit("young", make_record(12, seed=3, max_tokens=24), local=False)
    while not scheduler.load().waiting_requests:
        driver.step()
    driver.receive(admitted, young, [undisturbed(young).output(0)[:1]])
    for _ in range(9):
        driver.step()
    assert (scheduler.counters.preemptions, scheduler.load().waiting_requests) == (1, 1)
    scheduler.cancel("old")
    # What the old one had is not enough beside the young one.
    driver.step()
    assert scheduler.counters.preemptions == 2
    driver.run()
    assert driver.seen["waiting"].ended.preemptions == 1
    assert driver.seen["young"].ended.preemptions == 1
    for key, record in (("waiting", waiting), ("young", young)):
        assert driver.seen[key].tokens == undisturbed(record).tokens
    driver.assert_empty()


def test_steps_ahead_follow_the_tokens_that_are_not_known_yet() -> None:
    """The same tokens; every row but those behind a prompt's end is computed ahead."""
    driver = Driver(ahead=True)
    records = [make_record(5, max_tokens=most, seed=seed) for seed, most in ((1, 9), (2, 6))]
    for key, record in zip("ab", records, strict=True):
        driver.admit(key, record)
    driver.run()
    for key, record in zip("ab", records, strict=True):
        assert driver.seen[key].tokens == undisturbed(record).tokens
    assert driver.followed == 7 + 4
    assert driver.flight is None
    driver.assert_empty()


def test_blocks_of_a_dropped_request_wait_for_the_step_that_names_them() -> None:
    driver = Driver(num_blocks=8, ahead=True)
    for key, seed in (("a", 1), ("b", 2)):
        driver.admit(key, make_record(6, max_tokens=9, seed=seed))
    for _ in range(3):
        driver.step()
    assert driver.flight is not None
    free = driver.pool.num_free
    driver.scheduler.cancel("a")
    assert "a" not in driver.scheduler
    assert driver.pool.num_free == free
    driver.scheduler.check_integrity()
    driver.step()
    assert driver.pool.num_free == free + 3
    assert [part.request_id for part in driver.flight.slices] == ["b"]
    driver.run()
    assert driver.seen["b"].tokens == undisturbed(make_record(6, max_tokens=9, seed=2)).tokens
    driver.assert_empty()


def test_nothing_is_scheduled_ahead_of_what_is_not_plain_decoding() -> None:
    """Several outputs, penalties, somebody who prefills, drafts: the step is taken in first."""
    penalised = make_record(4, max_tokens=6, seed=3)
    penalised.sampling = SamplingParams(seed=3, presence_penalty=0.5)
    for record in (make_record(4, max_tokens=6, n=2), penalised):
        driver = Driver(ahead=True)
        driver.admit("a", record)
        driver.run()
        assert driver.followed == 0
    driver = Driver(ahead=True, max_step_tokens=4, mixed_prefill_tokens=2)
    driver.admit("a", make_record(4, max_tokens=30, seed=1))
    driver.step()
    driver.admit("b", make_record(12, max_tokens=9, seed=2))
    while "b" not in driver.seen:
        driver.step()
        assert driver.flight is None
    driver.step()
    assert driver.flight is not None


def test_a_failed_step_takes_the_one_ahead_with_it() -> None:
    driver = Driver(ahead=True)
    driver.admit("a", make_record(5, max_tokens=9))
    for _ in range(3):
        driver.step()
    assert driver.flight is not None
    driver.runner.fail_next = True
    driver.step()
    assert driver.seen["a"].error is not None
    driver.assert_empty()
