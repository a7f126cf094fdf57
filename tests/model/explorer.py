"""All schedules of a small world, one of each kind: two that differ only in the order of events that commute are one.

Source-set dynamic partial order reduction with sleep sets (Abdulla, Aronis, Jonsson, Sagonas 2014). It is stateless:
the world is made anew and its events are run again for each schedule. A world names its event sources; a source that is
enabled has one next event, and says what that event read and wrote once it has run.

The reduction keeps at least one schedule of every order of dependent events, so when the frontier is empty every state
that any schedule reaches between two dependent events was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stepping import Accesses

Source = tuple[Hashable, ...]


class Violation(AssertionError):  # noqa: N818  # it is no error of the explorer
    """What must never be was seen."""


class World(Protocol):
    """One run of a system from its start."""

    def enabled(self) -> list[Source]:
        """Who could go next, in the order in which the first schedule takes them."""

    def run(self, source: Source) -> Accesses:
        """Run the next event of a source. Raises Violation."""

    def check_end(self) -> None:
        """Nobody is enabled: what must hold then. Raises Violation."""

    def close(self) -> None:
        """Leave nothing behind."""


@dataclass(slots=True)
class _Node:
    """A state on the way: who is enabled, what is still to be tried, and what need not be."""

    enabled: list[Source]
    sleep: dict[Source, Accesses]
    backtrack: set[Source] = field(default_factory=set)
    taken: Source | None = None
    accesses: Accesses = field(default_factory=Accesses)
    past: int = 0
    """Bit i: event i of this schedule happened before the one taken here."""
    since: dict[Source, int] = field(default_factory=dict)
    """Which event enabled a source; absent: it was enabled at the start."""


@dataclass(slots=True)
class Report:
    """What an exploration saw."""

    schedules: int = 0
    states: int = 0
    """States visited, those of repeated ways counted once."""
    blocked: int = 0
    """Schedules given up since another order of the same events was seen."""
    longest: int = 0
    exhaustive: bool = False
    traces: list[tuple[list[Source], str]] = field(default_factory=list)
    """Schedules that end in a violation, and what it says."""

    @property
    def shortest(self) -> tuple[list[Source], str]:
        """The shortest trace to a violation."""
        return min(self.traces, key=lambda trace: len(trace[0]))

    def describe(self) -> str:
        """The shortest counterexample, for a person."""
        trace, message = self.shortest
        steps = [f"{number:3}  {' '.join(map(str, source))}" for number, source in enumerate(trace, 1)]
        return "\n".join([f"after {len(trace)} events: {message}", *steps])


class Explorer:
    """Depth first over all schedules of the worlds that `make` makes, which must all be equal."""

    def __init__(self, make: Callable[[], World], *, most_schedules: int | None = None, most_traces: int = 1) -> None:
        """Stop early after `most_schedules`, or when `most_traces` ended in a violation."""
        self._make = make
        self._most_schedules, self._most_traces = most_schedules, most_traces
        self._nodes: list[_Node] = []
        self._world: World | None = None
        self.report = Report()

    def explore(self) -> Report:
        """Until nothing is left to try, or a bound is met."""
        report = self.report
        self._restart()
        assert self._world is not None
        self._push(self._world.enabled(), {}, {})
        while self._nodes and len(report.traces) < self._most_traces:
            if self._most_schedules is not None and report.schedules >= self._most_schedules:
                break
            self._advance()
        report.exhaustive = not self._nodes
        if self._world is not None:
            self._world.close()
        return report

    def _advance(self) -> None:
        node = self._nodes[-1]
        if node.taken is not None:  # back from below it
            node.sleep[node.taken] = node.accesses
            node.taken = None
        left = [source for source in node.enabled if source in node.backtrack and source not in node.sleep]
        if not left:
            self._nodes.pop()
            self._drop()
            return
        if self._world is None:
            self._restart()
        self._take(node, left[0])

    def _take(self, node: _Node, source: Source) -> None:
        world = self._world
        assert world is not None
        node.taken = source
        try:
            node.accesses = world.run(source)
            enabled = world.enabled()
            if not enabled:
                self.report.schedules += 1
                self.report.longest = max(self.report.longest, len(self._nodes))
                world.check_end()
        except Violation as violation:
            self._found(violation)
            node.accesses = Accesses()
            node.sleep[source] = node.accesses
            node.taken = None
            self._drop()
            return
        self._order(node)
        # Whoever can't go any more since this went could have gone first.
        node.backtrack.update(other for other in node.enabled if other not in enabled and other != source)
        sleep = {other: seen for other, seen in node.sleep.items() if not seen.conflicts(node.accesses)}
        number = len(self._nodes) - 1
        since = {other: node.since.get(other, -1) for other in enabled if other in node.enabled and other != source}
        since |= {other: number for other in enabled if other not in since}
        self._push(enabled, sleep, since)

    def _push(self, enabled: list[Source], sleep: dict[Source, Accesses], since: dict[Source, int]) -> None:
        self.report.states += 1
        node = _Node(enabled, sleep, since=since)
        awake = [source for source in enabled if source not in sleep]
        node.backtrack.update(awake[:1])
        self.report.blocked += bool(enabled) and not awake
        self._nodes.append(node)

    def _order(self, node: _Node) -> None:
        """Where the event just run stands in the order of dependent events, and whom it could have overtaken."""
        number = len(self._nodes) - 1
        given = {origin for origin in node.accesses.origins if origin >= 0}
        if (enabler := node.since.get(node.taken, -1)) >= 0:  # type: ignore[arg-type]
            given.add(enabler)
        before = [(i, self._nodes[i]) for i in range(number)]
        given.update(i for i, other in before if other.taken == node.taken)
        racing = [i for i, other in before if i not in given and other.accesses.conflicts(node.accesses)]
        node.past = 0
        for i in (*given, *racing):
            node.past |= self._nodes[i].past | 1 << i
        for i in racing:
            if not any(self._nodes[j].past >> i & 1 for j in (*given, *racing) if j != i):
                self._try_before(i, number)

    def _try_before(self, early: int, late: int) -> None:
        """Event `late` could come before event `early`: have somebody who leads there tried at the state before it."""
        rest = [i for i in range(early + 1, late) if not self._nodes[i].past >> early & 1]
        rest.append(late)
        firsts: set[Source] = set()
        seen = 0
        for i in rest:
            if not self._nodes[i].past & seen:
                source = self._nodes[i].taken
                assert source is not None
                firsts.add(source)
            seen |= 1 << i
        place = self._nodes[early]
        if firsts.isdisjoint(place.backtrack):
            candidates = [source for source in place.enabled if source in firsts]
            assert candidates, f"nobody of {firsts} is enabled before event {early}"
            place.backtrack.add(candidates[0])

    def _found(self, violation: Violation) -> None:
        trace = [node.taken for node in self._nodes if node.taken is not None]
        short = shorten(self._make, trace, str(violation))
        self.report.traces.append((short, str(violation)))

    def _restart(self) -> None:
        self._drop()
        self._world = self._make()
        for node in self._nodes[:-1]:
            assert node.taken is not None
            self._world.run(node.taken)

    def _drop(self) -> None:
        if self._world is not None:
            self._world.close()
            self._world = None


def replay(make: Callable[[], World], trace: Sequence[Source]) -> str | None:
    """Run a trace; what the violation at its end says, None when there is none or the trace can't be run."""
    world = make()
    try:
        for source in trace:
            if source not in world.enabled():
                return None
            world.run(source)
        if not world.enabled():
            world.check_end()
    except Violation as violation:
        return str(violation)
    finally:
        world.close()
    return None


def shorten(make: Callable[[], World], trace: list[Source], message: str) -> list[Source]:
    """Leave out events, last first, as long as the violation stays."""
    at = len(trace) - 2
    while at >= 0:
        shorter = trace[:at] + trace[at + 1 :]
        if replay(make, shorter) == message:
            trace = shorter
        at -= 1
    return trace
