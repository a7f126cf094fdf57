"""A decode worker's scheduler and engine as its flags put them together, without its RPCs."""

from __future__ import annotations

from typing import Any

from decode_service import wiring
from decode_service.events import Tokens
from decode_service.flags import parse_flags
from decode_service.scheduler import Scheduler
from decode_service.speculation.counts import Counts
from decode_service.speculation.speculator import Speculator
from engine.block_pool import BlockPool
from tandem.record import OutputState, Record, SamplingParams, StopRules

PROMPTS = [[5, 9, 14, 9, 5, 77], list(range(30, 91)), [200], [8] * 23]
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_p=0.95, seed=4),
    SamplingParams(temperature=0.6, repetition_penalty=1.3, seed=9),
    SamplingParams(temperature=0.7, seed=3, n=2),
]
TOKENS = 24


def run(*flags: str) -> tuple[dict[tuple[str, int], list[int]], dict[str, Counts], BlockPool]:
    """All of PROMPTS with each of PARAMS at once, through a decode worker's scheduler and engine: the tokens by request
    and output, and what the proposers did.
    """
    parsed = parse_flags([*flags, "--num-blocks", "400", "--block-size", "8", "--threads", "1", "--no-share-weights"])
    loaded = wiring.load(parsed)
    parts = wiring.parts_of(loaded.engine, parsed, "", loaded.costs, loaded.speculation)
    pool = BlockPool(400, 8, prefix_cache=parts.prefix_cache)
    for borrower in parts.speculation.borrowers:
        borrower.borrow(pool)
    scheduler = Scheduler(parts.scheduler, pool, Speculator(parts.speculation, parts.scheduler.vocab_size))
    found: dict[tuple[str, int], list[int]] = {}
    events: list[Any] = []
    for i, prompt in enumerate(PROMPTS):
        for j, params in enumerate(PARAMS):
            outputs = [OutputState() for _ in range(params.n)]
            stopping = StopRules(TOKENS, ignore_eos=True)
            record = Record(f"{i}.{j}", parts.identity.model_id, list(prompt), params, stopping, outputs)
            events += scheduler.admit(record.request_id, record, local=True)[1]
    while (batch := scheduler.schedule()) is not None:
        events += scheduler.update(batch, parts.runner.run(batch))
        scheduler.check_integrity()
    for event in events:
        if isinstance(event, Tokens):
            for delta in event.deltas:
                found.setdefault((event.key, delta.index), []).extend(delta.token_ids)
    return found, scheduler.speculator.counts, pool
