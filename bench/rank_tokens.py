"""Tokens of a model that several GPUs share beside those of one: `torchrun --nproc-per-node 2 -m bench.rank_tokens`.

Sums over ranks round otherwise, so tokens differ where two logits are closer than that: hardly ever in float32. Rank 0
prints, as one line of JSON, how many sequences are the same, and for the others how far apart the two tokens were, in
nats, where they part: beside the median distance of the two likeliest tokens. What follows there is not compared.
Captured steps of the ranks are compared with their eager ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence

from bench.random_weights import PREFIX, SHAPES
from bench.sequences import GREEDY, BenchSequence, SequenceDriver, load_bench_engine
from engine.batch import Batch, SampledToken, SampleSpec, Slice
from engine.loading import Engine
from engine.parallel.group import Ranks, join_ranks
from engine.parallel.world import world_from
from tandem.errors import ConfigError

SEQUENCES, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 200, 64
SETTINGS = {"device": "cuda", "max_sequences": SEQUENCES}
CHUNK = SEQUENCES * PROMPT_TOKENS
Drawn = list[list[SampledToken]]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.rank_tokens", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="llama-1b", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    given = parser.parse_args()
    world = world_from(os.environ)
    if world is None:
        raise ConfigError("WORLD_SIZE: start it by torchrun, with 2 processes or more")
    ranks = join_ranks(world, gpu=True)
    engine = _load(given.shape, given.dtype, ranks)
    if not ranks.leads:
        assert engine.follow is not None
        engine.follow()
        ranks.close()
        return
    together, replayed = generate(engine), generate(engine, alternatives=None)
    ranks.close()
    alone = generate(_load(given.shape, given.dtype, None))
    what = {"shape": given.shape, "dtype": given.dtype, "ranks": world.size}
    same = sum(ids_of(one) == ids_of(other) for one, other in zip(together, replayed, strict=True))
    print(json.dumps({**what, **compared(alone, together), "captured_same_as_eager": same}), flush=True)


def _load(shape: str, dtype: str, ranks: Ranks | None) -> Engine:
    engine = load_bench_engine(PREFIX + shape, {**SETTINGS, "dtype": dtype}, CHUNK, 4096, ranks)
    if ranks is None or ranks.leads:
        engine.runner.warm_up()
    return engine


def ids_of(tokens: Sequence[SampledToken]) -> list[int]:
    """Without their log probabilities."""
    return [token.token_id for token in tokens]


def generate(engine: Engine, alternatives: int | None = 2) -> Drawn:
    """Greedy tokens of the same random prompts side by side, each with its likeliest; None: captured where possible."""
    driver = SequenceDriver(engine, CHUNK)
    drawn: Drawn = [[] for _ in range(SEQUENCES)]
    with driver.sequences(SEQUENCES, PROMPT_TOKENS) as sequences:
        for position in range(OUTPUT_TOKENS):
            output = engine.runner.run(Batch([_slice(sequence, position, alternatives) for sequence in sequences]))
            for sequence, tokens, (token,) in zip(sequences, drawn, output.samples, strict=True):
                sequence.computed = len(sequence.tokens)
                sequence.tokens.append(token.token_id)
                tokens.append(token)
    return drawn


def _slice(sequence: BenchSequence, position: int, alternatives: int | None) -> Slice:
    """All that isn't computed, and a draw behind it."""
    sequence.table.ensure(len(sequence.tokens))
    spec = SampleSpec(0, GREEDY, position, logprobs=alternatives)
    known = sequence.tokens[sequence.computed :]
    return Slice("bench", known, sequence.computed, sequence.table.blocks, [spec])


def compared(alone: Sequence[Sequence[SampledToken]], together: Sequence[Sequence[SampledToken]]) -> dict[str, object]:
    """`alone` says what the tokens' distances were; a distance of None: not even the second likeliest."""
    parted: list[float | None] = []
    for one, other in zip(alone, together, strict=True):
        pairs = zip(one, other, strict=True)
        first = next(((a, b) for a, b in pairs if a.token_id != b.token_id), None)
        if first is not None:
            parted.append(_distance(first[0], first[1].token_id))
    usual = [_distance(token, None) or 0.0 for tokens in alone for token in tokens]
    return {
        "sequences": len(alone),
        "same_tokens": len(alone) - len(parted),
        "parted_by_nats": [None if gap is None else round(gap, 4) for gap in parted],
        "two_likeliest_apart_median": round(statistics.median(usual), 4),
    }


def _distance(token: SampledToken, other: int | None) -> float | None:
    """From the drawn token down to `other`, or to the second likeliest."""
    assert token.logprobs is not None
    second, (best, next_best) = token.logprobs.top_token_ids[1], token.logprobs.top_logprobs[:2]
    return best - next_best if other in (None, second) else None


if __name__ == "__main__":
    main()
