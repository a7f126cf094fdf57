"""Random lives in tiny pools, with drafts of all kinds: books agree after every step, tokens are those of an
undisturbed run, the oldest finishes.
"""

from __future__ import annotations

import itertools
from functools import cache

from decode_scheduling import Driver, Knowing, Seen, make_record, undisturbed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decode_service.events import Admission
from decode_service.speculation.config import SpeculationConfig
from decode_service.speculation.proposer import OutputKey
from tandem.errors import OverloadedError
from tandem.record import FinishReason, Record, TokenDelta

BLOCK = 3


@cache
def whole_of(prompt: int, most: int, n: int, seed: int) -> Seen:
    return undisturbed(make_record(prompt, max_tokens=most, n=n, seed=seed, ignore_eos=False))


class Life:
    """One random run. `wanted` holds each request's undisturbed outputs, `remote` what waits for a transfer."""

    def __init__(self, num_blocks: int, cache: bool, drafts: tuple[int, ...], ahead: bool = False) -> None:
        """`drafts`: how many tokens of each draft are right, in turn; none: no drafts."""
        turns = itertools.cycle(drafts)
        self.proposer = Knowing(self.truth, lambda ask: next(turns))
        speculation = SpeculationConfig([self.proposer], max_tokens=5, fixed=True) if drafts else None
        self.driver = Driver(
            num_blocks,
            BLOCK,
            prefix_cache=cache,
            speculation=speculation,
            ahead=ahead,
            max_step_tokens=12,
            mixed_prefill_tokens=3,
        )
        self.records: dict[str, tuple] = {}
        self.remote: dict[str, Admission] = {}
        self.releasing: set[str] = set()
        self.stopped: dict[str, set[int]] = {}
        self.given: dict[tuple[str, int], int] = {}

    def truth(self, key: OutputKey) -> list[int]:
        return whole_of(*self.records[key.request][:4]).output(key.output)

    def fresh(self, key: str) -> tuple[Record, Seen]:
        prompt, most, n, seed, have = self.records[key]
        whole = whole_of(prompt, most, n, seed)
        outputs = [whole.output(i)[:have] for i in range(n)]
        return make_record(prompt, max_tokens=most, n=n, seed=seed, outputs=outputs, ignore_eos=False), whole

    def admit(self, data: st.DataObject) -> None:
        key = f"r{len(self.records)}"
        self.records[key] = tuple(
            data.draw(st.integers(low, high)) for low, high in ((1, 14), (1, 9), (1, 3), (0, 3), (0, 2))
        )
        record, _ = self.fresh(key)
        for index, output in enumerate(record.outputs):
            self.given[key, index] = len(output.token_ids)
        local = data.draw(st.booleans())
        try:
            admitted = self.driver.admit(key, record, local=local)
        except OverloadedError:
            self.driver.scheduler.check_integrity()
            return
        if not local and key in self.driver.scheduler:
            self.remote[key] = admitted

    def take_remote(self, data: st.DataObject) -> tuple[str, Admission]:
        key = data.draw(st.sampled_from(sorted(self.remote)))
        return key, self.remote.pop(key)

    def commit(self, data: st.DataObject) -> None:
        if not self.remote:
            return
        key, admitted = self.take_remote(data)
        record, whole = self.fresh(key)
        single = record.sampling.n == 1
        firsts = [
            whole.output(i)[len(out.token_ids) :][:1] if single or not out.token_ids else []
            for i, out in enumerate(record.outputs)
        ]
        if data.draw(st.booleans()):  # a sender that had less than what was forced meanwhile
            firsts = [[] for _ in firsts]
        self.driver.receive(admitted, record, firsts)

    def retarget(self, data: st.DataObject) -> None:
        if not self.remote:
            return
        key = data.draw(st.sampled_from(sorted(self.remote)))
        _, whole = self.fresh(key)
        emitted = [TokenDelta(0, 0, whole.output(0)[: data.draw(st.integers(0, 3))])]
        self.given[key, 0] = max(self.given[key, 0], len(emitted[0].token_ids))
        if data.draw(st.booleans()):
            del self.remote[key]
            self.driver.take(self.driver.scheduler.start_local(key, emitted))
        else:
            self.driver.scheduler.force(key, emitted)

    def cancel(self, data: st.DataObject) -> None:
        if aboard := self.driver.scheduler.keys():
            key = data.draw(st.sampled_from(aboard))
            self.stopped.setdefault(key, set()).update(range(3))
            self.remote.pop(key, None)
            if self.driver.scheduler.cancel(key, self.driver.scheduler.steps):
                self.releasing.add(key)

    def release(self, data: st.DataObject) -> None:
        if self.releasing:
            key = data.draw(st.sampled_from(sorted(self.releasing)))
            self.releasing.discard(key)
            self.driver.scheduler.release(key)

    def finish(self, data: st.DataObject) -> None:
        if aboard := self.driver.scheduler.keys():
            key = data.draw(st.sampled_from(aboard))
            index = data.draw(st.integers(0, self.records[key][2] - 1))
            self.stopped.setdefault(key, set()).add(index)
            self.driver.take(self.driver.scheduler.finish(key, index))
            seen = self.driver.seen.get(key)
            if key in self.remote and seen is not None and seen.ended is not None:
                del self.remote[key]
                self.releasing.add(key)

    def step(self, data: st.DataObject) -> None:
        for _ in range(data.draw(st.integers(1, 4))):
            self.driver.step()

    def close(self, data: st.DataObject) -> None:
        """Everything in the air lands; then all who are aboard finish in bounded steps, the oldest never preempted."""
        while self.releasing:
            self.release(data)
        while self.remote:
            self.commit(data)
        self.driver.run(limit=1500)
        self.driver.assert_empty()
        assert self.driver.scheduler.counters.worst_steps_after_cancel == 0
        assert not self.proposer.known

    def check(self) -> None:
        for key, seen in self.driver.seen.items():
            assert seen.error is None
            _, whole = self.fresh(key)
            stopped = self.stopped.get(key, set())
            for index in range(self.records[key][2]):
                wanted = whole.output(index)
                got = seen.tokens.get(index, {})
                assert all(wanted[p] == token for p, token in got.items()), "a disturbed run drew another token"
                if index not in stopped:
                    assert sorted(got) == list(range(self.given[key, index], len(wanted)))
                    assert seen.finished[index] is whole.finished[index]
                elif index in seen.finished:
                    assert seen.finished[index] in (FinishReason.STOP, whole.finished[index])


ACTIONS = (
    Life.admit,
    Life.admit,
    Life.commit,
    Life.retarget,
    Life.cancel,
    Life.release,
    Life.finish,
    Life.step,
    Life.step,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.integers(6, 16), st.booleans(), st.lists(st.integers(0, 5), max_size=4))
def test_random_lives(data: st.DataObject, num_blocks: int, cache: bool, drafts: list[int]) -> None:
    life = Life(num_blocks, cache, tuple(drafts))
    for _ in range(data.draw(st.integers(3, 40))):
        data.draw(st.sampled_from(ACTIONS))(life, data)
        life.driver.scheduler.check_integrity()
    life.close(data)
    life.check()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.integers(6, 16), st.booleans())
def test_random_lives_with_steps_ahead(data: st.DataObject, num_blocks: int, cache: bool) -> None:
    """Everything happens while a step is under way, whose blocks nobody else may get."""
    life = Life(num_blocks, cache, (), ahead=True)
    for _ in range(data.draw(st.integers(3, 40))):
        data.draw(st.sampled_from(ACTIONS))(life, data)
        life.driver.scheduler.check_integrity()
    life.close(data)
    life.check()
