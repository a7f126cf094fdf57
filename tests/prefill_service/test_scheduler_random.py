"""Random submits, cancels, steps and failures: the books hold, and first tokens are those of a run alone."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_scheduling import Driver, expected_tokens, make_record

from tandem.errors import InternalError, OverloadedError

COMMANDS = st.lists(
    st.one_of(
        # length, seed (few: prompts share prefixes), n, priority, tokens that the only output has already
        st.tuples(
            st.just("submit"),
            st.integers(1, 40),
            st.integers(0, 2),
            st.integers(1, 3),
            st.integers(-3, 3),
            st.integers(0, 3),
        ),
        st.tuples(st.just("step")),
        st.tuples(st.just("step")),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("cancel_in_step"), st.integers(0, 30)),
        st.tuples(st.just("fail_step")),
    ),
    max_size=60,
)


class Play:
    """One random history."""

    def __init__(self, chunk: int, block_size: int, prefix_cache: bool) -> None:
        self.driver = Driver(
            num_blocks=-(-48 // block_size),
            block_size=block_size,
            prefix_cache=prefix_cache,
            max_step_tokens=chunk,
            max_sequences=3,
            max_waiting=6,
        )
        self.records = {}
        self.released: set[str] = set()

    def submit(self, length: int, seed: int, n: int, priority: int, done: int) -> None:
        record = make_record(length, seed=seed, n=n, priority=priority, outputs=[[5] * done] if n == 1 else None)
        key = f"k{len(self.records)}"
        try:
            self.driver.submit(key, record)
        except OverloadedError as error:
            if error.reason != "QUEUE_FULL":
                raise
            return
        self.records[key] = record

    def cancel(self, number: int) -> None:
        keys = [key for key in self.records if key not in self.released]
        if keys:
            key = keys[number % len(keys)]
            self.released.add(key)
            self.driver.release(key)

    def cancel_in_step(self, number: int) -> None:
        batch = self.driver.schedule()
        self.cancel(number)
        if batch is not None:
            self.driver.finish(batch)

    def fail_step(self) -> None:
        if self.driver.schedule() is not None:
            self.driver.take(self.driver.scheduler.fail_step(InternalError("fire")))
            self.driver.scheduler.check_integrity()

    def step(self) -> None:
        self.driver.step()

    def finish(self) -> None:
        """Everybody who is left gets there, if those who are done give their blocks back."""
        for _ in range(2000):
            worked = self.driver.step()
            done = [k for k, seen in self.driver.seen.items() if seen.deltas is not None or seen.error is not None]
            for key in done:
                if key not in self.released:
                    self.released.add(key)
                    self.driver.release(key)
            if worked is None and len(self.released) == len(self.records):
                return
        raise AssertionError("somebody starves")


@settings(max_examples=150, deadline=None)
@given(COMMANDS, st.sampled_from([1, 5, 16, 64]), st.sampled_from([1, 4, 8]), st.booleans())
def test_any_history(commands: list[tuple[Any, ...]], chunk: int, block_size: int, prefix_cache: bool) -> None:
    play = Play(chunk, block_size, prefix_cache)
    for name, *arguments in commands:
        getattr(play, name)(*arguments)
    play.finish()
    play.driver.assert_empty()
    for key, record in play.records.items():
        seen = play.driver.seen[key]
        if seen.deltas is not None:
            assert seen.first_tokens == expected_tokens(record)
    assert all(batch.num_tokens <= chunk for batch in play.driver.runner.batches)
