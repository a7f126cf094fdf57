"""Speculation of one decode worker: asks proposers, decides how many drafts a step verifies, and keeps the figures.

A step: `drafts` while it is scheduled -> `saw` for every output that got tokens -> `timed`. A request's end is told by
`forget`. The engine's thread uses it. Nothing here decides a token, only how many are tried at once.

Drafts are verified when that is expected to bring more tokens a second, by measured acceptance (`acceptance`) and
measured time of steps (`costs`). What was not measured for long is measured again now and then: a step without drafts
where they are always verified, one with drafts where they never are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from decode_service.speculation import policy
from decode_service.speculation.acceptance import Acceptance
from decode_service.speculation.asking import Asker, Candidate
from decode_service.speculation.config import SpeculationConfig
from decode_service.speculation.costs import Cost, StepCosts
from decode_service.speculation.counts import Counts
from decode_service.speculation.proposer import Ask, OutputKey
from tandem.record import Speculation

MARGIN: Final = 1.02
"""Gain below which drafts are not worth it."""
PROBE_STEPS: Final = 128
"""After so many steps what matters and was not measured is measured: that costs at most 1 % of the time."""
PROBE_TOKENS: Final = 3
TRIES: Final = 8
LONGEST_REST: Final = 3
"""After each 8 times that nothing was verified an output rests twice as long, at last 8 steps, and fewer where fewer
than 8 outputs are aboard: for one alone asking is cheap beside a step."""
AWAKE: Final = 4
"""Tokens in a row that a draft has right end the rest."""
PROBE_CHANCE: Final = 0.5
"""Expected tokens of a draft below which no cost of rows would make it pay."""


@dataclass(frozen=True, slots=True)
class Want:
    """An output that could take drafts in this step."""

    ask: Ask
    options: Speculation


@dataclass(slots=True)
class _Rest:
    """How long an output is not asked for."""

    refused: int = 0
    """Times in a row that nothing of it was verified."""
    left: int = 0
    """Steps to rest."""

    def over(self) -> bool:
        self.left -= 1
        return self.left < 0

    def asked(self, verified: bool, outputs: int) -> None:
        self.refused = 0 if verified else self.refused + 1
        longest = min(LONGEST_REST, outputs.bit_length() - 1)
        self.left = (1 << min(longest, self.refused // TRIES)) - 1


class Speculator:
    """See the module's text."""

    def __init__(self, config: SpeculationConfig, vocab_size: int, costs: StepCosts | None = None) -> None:
        """`costs` may hold what was measured at the start."""
        self.config = config
        self.costs = costs if costs is not None else StepCosts()
        self._acceptance = Acceptance()
        self._askers = {
            proposer.name: Asker(proposer, self._acceptance, vocab_size, MARGIN, always=config.fixed)
            for proposer in config.proposers
        }
        self._proposed: dict[OutputKey, str] = {}
        """Whose draft each output was given last."""
        self._rests: dict[OutputKey, _Rest] = {}
        self._rejected: dict[str, int] = {}
        """Drafts of this step that were not kept, by proposer."""

    @property
    def counts(self) -> dict[str, Counts]:
        """The figures of each proposer."""
        return {name: asker.counts for name, asker in self._askers.items()}

    @property
    def most(self) -> int:
        """Most drafts of one output in a step."""
        return self.config.max_tokens if self._askers else 0

    def limit(self, options: Speculation) -> int:
        """Most drafts of one output of a request with these options; 0: it gets none."""
        if not self._askers or not (options.mode == "auto" or options.mode in self._askers):
            return 0
        return self.most if options.max_tokens is None else min(self.most, options.max_tokens)

    def wants(self, key: OutputKey) -> bool:
        """Whether an output that may have drafts is to be asked for in this step: one whose drafts weren't worth it for
        long rests a few steps, since asking has its price too.
        """
        if (rest := self._rests.get(key)) is None:
            rest = self._rests[key] = _Rest()
        return self.config.fixed or rest.over()

    def drafts(self, wants: Sequence[Want], outputs: int, rows: int) -> list[list[int]]:
        """Drafts to verify for each of `wants` (all of them said so), maybe none. `rows` are computed without them, for
        `outputs` and else.

        What the caller then has no room for it leaves out.
        """
        chosen: list[list[int]] = [[] for _ in wants]
        cost = self.costs.line(outputs, rows)
        best: dict[int, Candidate] = {}
        for name, asker in self._askers.items():
            asks = [(place, want.ask) for place, want in enumerate(wants) if want.options.mode in ("auto", name)]
            for candidate in asker.candidates(asks, outputs, cost):
                rival = best.get(candidate.place)
                if rival is None or candidate.expected > rival.expected:
                    best[candidate.place] = candidate
        candidates = list(best.values())
        for candidate, count in zip(candidates, self._lengths(candidates, outputs, rows, cost), strict=True):
            chosen[candidate.place] = candidate.tokens[:count]
            self._proposed[candidate.key] = candidate.kind.proposer
        for want, tokens in zip(wants, chosen, strict=True):
            self._rests[want.ask.key].asked(bool(tokens), outputs)
        return chosen

    def _lengths(self, candidates: list[Candidate], outputs: int, rows: int, cost: Cost) -> list[int]:
        """How many tokens of each candidate are verified."""
        full = [len(candidate.tokens) for candidate in candidates]
        if self.config.fixed or not candidates:
            return full
        wanted = policy.lengths([candidate.chances for candidate in candidates], outputs, cost, MARGIN)
        if rows != outputs:
            return wanted  # a step with a part of a prompt measures nothing
        if any(wanted):
            return [0] * len(full) if self.costs.age(outputs, rows) > PROBE_STEPS else wanted
        place = max(range(len(full)), key=lambda i: candidates[i].expected)
        count = min(PROBE_TOKENS, full[place])
        if candidates[place].expected > PROBE_CHANCE and self.costs.age(outputs, rows + count) > PROBE_STEPS:
            wanted[place] = count
        return wanted

    def saw(self, key: OutputKey, tokens: Sequence[int], drafts: Sequence[int]) -> int:
        """The output got `tokens` in a step that verified `drafts`. Returns how many of these were kept."""
        accepted = 0
        while accepted < min(len(drafts), len(tokens)) and drafts[accepted] == tokens[accepted]:
            accepted += 1
        if drafts:
            name = self._proposed[key]
            self._askers[name].counts.add(len(drafts), accepted)
            self._rejected[name] = self._rejected.get(name, 0) + len(drafts) - accepted
        if self._acceptance.saw(key, tokens) >= AWAKE and (rest := self._rests.get(key)) is not None:
            rest.refused = rest.left = 0
        for asker in self._askers.values():
            asker.proposer.observe(key, tokens, accepted)
        return accepted

    def timed(self, outputs: int, drafts: int, others: int, seconds: float) -> None:
        """The step is over: it computed `outputs` rows that decode, `drafts` behind them, and `others` of prompts."""
        rejected, self._rejected = self._rejected, {}
        if outputs and not others:
            self.costs.measured(outputs, outputs + drafts, seconds)
        if not rejected or not drafts:  # without drafts: what is left of a step whose figures were never taken in
            return
        before, after = (self.costs.seconds(outputs, outputs + others + more) for more in (0, drafts))
        for name, count in rejected.items():
            self._askers[name].counts.lost_seconds += max(0.0, after - before) * count / drafts

    def forget(self, keys: Sequence[OutputKey]) -> None:
        """These outputs have left."""
        for key in keys:
            self._proposed.pop(key, None)
            self._rests.pop(key, None)
            self._acceptance.finished(key)
            for asker in self._askers.values():
                asker.proposer.finished(key)
