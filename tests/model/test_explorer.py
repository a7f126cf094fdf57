"""The explorer against all orders of toy worlds: it must see every result that any order has, with fewer schedules."""

from __future__ import annotations

import itertools
import random

import pytest
from explorer import Explorer, Source, Violation, replay
from stepping import Accesses

Step = tuple[str, str]


class Toy:
    """Threads of steps over variables: (variable, "set") stores the thread, (variable, "get") keeps what it reads,
    (variable, "wait") can't go before somebody stored there, (variable, "end") keeps others from waiting for it."""

    def __init__(self, threads: list[list[Step]], results: set[object], bad: object = None) -> None:
        self._threads, self._results, self._bad = threads, results, bad
        self._at = [0] * len(threads)
        self._values: dict[str, int] = {}
        self._seen: list[tuple[int, str, int | None]] = []

    def enabled(self) -> list[Source]:
        return [("thread", n) for n in range(len(self._threads)) if self._can_go(n)]

    def _can_go(self, number: int) -> bool:
        steps, at = self._threads[number], self._at[number]
        if at == len(steps):
            return False
        name, what = steps[at]
        return what != "wait" or name in self._values

    def run(self, source: Source) -> Accesses:
        number = source[1]
        assert isinstance(number, int)
        name, what = self._threads[number][self._at[number]]
        self._at[number] += 1
        if what == "get":
            self._seen.append((number, name, self._values.get(name)))
            return Accesses(reads={name})
        if what == "set":
            self._values[name] = number
        elif what == "end":
            self._values.pop(name, None)
        return Accesses(reads={name}) if what == "wait" else Accesses(writes={name})

    @property
    def result(self) -> object:
        return tuple(self._at), tuple(sorted(self._values.items())), tuple(sorted(self._seen, key=str))

    def check_end(self) -> None:
        self._results.add(self.result)
        if self.result == self._bad:
            raise Violation("the bad end")

    def close(self) -> None:
        """Nothing is held."""


def all_results(threads: list[list[Step]]) -> tuple[set[object], int]:
    """Every order, one by one."""
    results: set[object] = set()
    count = 0

    def go(trace: list[Source]) -> None:
        nonlocal count
        toy = Toy(threads, results)
        for source in trace:
            toy.run(source)
        enabled = toy.enabled()
        if not enabled:
            count += 1
            toy.check_end()
        for source in enabled:
            go([*trace, source])

    go([])
    return results, count


def random_threads(seed: int) -> list[list[Step]]:
    draw = random.Random(seed)
    kinds = ("set", "get", "get", "wait", "end")
    return [[(draw.choice("xyz"), draw.choice(kinds)) for _ in range(draw.randint(1, 3))] for _ in range(3)]


@pytest.mark.parametrize("seeds", [range(start, start + 20) for start in range(0, 100, 20)], ids=lambda r: f"{r.start}")
def test_no_result_is_missed(seeds: range) -> None:
    for seed in seeds:
        threads = random_threads(seed)
        wanted, orders = all_results(threads)
        seen: set[object] = set()
        report = Explorer(lambda threads=threads, seen=seen: Toy(threads, seen)).explore()  # type: ignore[misc]
        assert report.exhaustive
        assert seen == wanted, f"seed {seed}"
        assert report.schedules <= orders


def test_orders_that_commute_are_one() -> None:
    threads: list[list[Step]] = [[(name, "set"), (name, "get")] for name in "abcd"]
    report = Explorer(lambda: Toy(threads, set())).explore()
    assert report.exhaustive
    assert (report.schedules, report.longest) == (1, 8)


def test_a_bad_end_is_found_and_its_trace_is_short() -> None:
    threads: list[list[Step]] = [[("x", "set"), ("x", "get")], [("x", "set")], [("y", "set"), ("y", "get")]]
    results, _ = all_results(threads)
    bads = [result for result in results if (0, "x", 1) in result[2]]  # type: ignore[index]
    for bad in itertools.islice(bads, 2):
        make = lambda bad=bad: Toy(threads, set(), bad)  # noqa: E731
        report = Explorer(make).explore()
        trace, message = report.shortest
        assert message == "the bad end"
        assert replay(make, trace) == message
        assert f"after {len(trace)} events: the bad end" in report.describe()


def test_a_bound_says_that_it_was_met() -> None:
    threads: list[list[Step]] = [[("x", "set")], [("x", "set")], [("x", "set")]]
    report = Explorer(lambda: Toy(threads, set()), most_schedules=2).explore()
    assert (report.schedules, report.exhaustive) == (2, False)
