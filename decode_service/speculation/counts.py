"""What speculation has done, in figures. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Counts:
    """Of one proposer since the start."""

    drafts: int = 0
    """Drafts of which at least one token was verified."""
    draft_tokens: int = 0
    accepted_tokens: int = 0
    tried_at: list[int] = field(default_factory=list)
    """Tokens verified by their place in the draft."""
    accepted_at: list[int] = field(default_factory=list)
    seconds: float = 0.0
    """Spent in `propose`."""
    lost_seconds: float = 0.0
    """What verifying tokens that weren't kept has cost, by the table of costs."""

    def add(self, drafted: int, accepted: int) -> None:
        """One draft was verified."""
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += accepted
        missing = drafted - len(self.tried_at)
        self.tried_at += [0] * missing
        self.accepted_at += [0] * missing
        for place in range(drafted):
            self.tried_at[place] += 1
            self.accepted_at[place] += place < accepted
