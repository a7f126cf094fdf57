from __future__ import annotations

import pytest
from prefill_scheduling import VOCAB, Driver, make_record

from prefill_service.config import SchedulerConfig
from tandem.errors import (
    ConfigError,
    IncompatibleError,
    InvalidRequestError,
    OverloadedError,
    TandemError,
)
from tandem.record import FinishReason, Record


@pytest.mark.parametrize(
    ("record", "error", "words"),
    [
        (make_record([]), InvalidRequestError, "at least one"),
        (make_record([1, VOCAB]), InvalidRequestError, str(VOCAB)),
        (make_record([1, -1]), InvalidRequestError, "-1"),
        (make_record([1], outputs=[[VOCAB]]), InvalidRequestError, str(VOCAB)),
        (make_record(64), InvalidRequestError, "context"),
        (make_record(60, outputs=[[1, 2, 3, 4]]), InvalidRequestError, "context"),
        (make_record([1], n=2, outputs=[[]]), InvalidRequestError, "n=2"),
        (make_record([1], model_id="another"), IncompatibleError, "another"),
    ],
)
def test_records_that_cannot_run_are_refused(record: Record, error: type[TandemError], words: str) -> None:
    driver = Driver(max_context=64, model_id="" if error is InvalidRequestError else "mine")
    with pytest.raises(error, match=words):
        driver.submit("a", record)
    driver.assert_empty()


def test_a_finished_record_is_refused() -> None:
    driver = Driver()
    record = make_record([1])
    record.outputs[0].finish_reason = FinishReason.STOP
    with pytest.raises(InvalidRequestError, match="finished"):
        driver.submit("a", record)


def test_a_prompt_that_can_never_fit_is_refused_for_good() -> None:
    driver = Driver(num_blocks=4, block_size=4)
    with pytest.raises(OverloadedError, match="5 KV blocks") as caught:
        driver.submit("a", make_record(17))
    assert (caught.value.retry_after, caught.value.reason) == (None, "EXCEEDS_POOL")
    driver.submit("b", make_record(16))
    driver.run()
    assert driver.seen["b"].deltas is not None


def test_the_queue_is_bounded() -> None:
    driver = Driver(max_waiting=2)
    assert driver.submit("a", make_record(4)).waiting_requests == 1
    assert driver.submit("b", make_record(4)).waiting_requests == 2
    with pytest.raises(OverloadedError, match="2 requests wait") as caught:
        driver.submit("c", make_record(4))
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_after is not None
    driver.step()
    driver.submit("c", make_record(4))


@pytest.mark.parametrize(
    "key", ["max_step_tokens", "max_sequences", "max_context", "vocab_size", "max_waiting", "aging_seconds"]
)
def test_bad_limits_are_refused_by_name(key: str) -> None:
    values = {"max_step_tokens": 1, "max_sequences": 1, "max_context": 1, "vocab_size": 1, key: 0}
    with pytest.raises(ConfigError, match=key):
        SchedulerConfig(**values)
