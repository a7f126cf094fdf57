"""The flags of `python -m prefill_service`: those that every worker has."""

from __future__ import annotations

from collections.abc import Sequence

from worker.flags import Flags, Parser, common


def parse_flags(argv: Sequence[str]) -> Flags:
    """Raises ConfigError. Values of the engine are checked where they are resolved."""
    parser = Parser(
        "prefill_service",
        "Runs one prefill worker.",
        callers="where gateways call",
        chunk="prompt tokens a step, all requests together",
        sequences="most prompts that are computed at once",
    )
    return Flags(**common(parser.parse_args(argv)))
