"""Real ranks: the tokens of one process, a row's bits whatever else is computed, and how all end when one does."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

from greedy_steps import Answer, config_of, greedy
from rank_processes import RankProcess, rank_processes

from engine.loading import Engine, load_engine

TIE = 1e-3
"""Sums over ranks are in another order: what one rank prefers by less may come out the other way."""
HERE = Path(__file__).parent


def prompts_of(vocabulary: int) -> list[list[int]]:
    """Of several lengths, one over a few blocks."""
    rng = random.Random(3)
    return [[rng.randrange(vocabulary) for _ in range(length)] for length in (7, 50, 23)]


def command(model: Path, settings: dict[str, Any], prompts: list[list[int]], count: int) -> list[str]:
    """Of `rank_process.py`."""
    wanted = json.dumps({"settings": settings, "prompts": prompts, "count": count})
    return [str(HERE / "rank_process.py"), str(model), wanted]


def check_tokens(leader: RankProcess, engine: Engine, prompts: list[list[int]], count: int) -> None:
    """Tokens as `engine`'s, but behind a tie; the same bits in a batch, in pieces and alone."""
    found = leader.read()
    assert found["alone"] == found["together"]
    for answer, expected in zip(found["together"], greedy(engine, prompts, count, 64), strict=True):
        check_answer(answer["tokens"], expected)


def check_answer(tokens: list[int], expected: Answer) -> None:
    """The same tokens, or a first other one where the expected one was hardly ahead."""
    assert len(tokens) == len(expected.tokens)
    other = [gap for a, b, gap in zip(tokens, expected.tokens, expected.gaps, strict=True) if a != b]
    assert not other or other[0] < TIE


def test_two_ranks_give_the_tokens_of_one(tiny_model: Path, tmp_path: Path) -> None:
    prompts, settings = prompts_of(211), {"compute": "exact"}
    with rank_processes(command(tiny_model, settings, prompts, 16), 2, tmp_path) as (leader, other):
        engine = load_engine(config_of(tiny_model, settings))
        held = [leader.read(), other.read()]
        assert held[0] == held[1]
        assert held[0]["model"] == engine.model_id
        assert held[0]["numerics"] != engine.numerics_id
        check_tokens(leader, engine, prompts, 16)
        # A rank that dies while rank 0 waits for its share of a sum.
        other.process.send_signal(signal.SIGSTOP)
        assert leader.process.stdin is not None
        leader.process.stdin.write("step\n")
        leader.process.stdin.flush()
        other.process.kill()
        code, said = leader.ended()
        assert code == 1
        assert "start all ranks anew" in said


def test_three_ranks_share_the_default_model(default_model: Path, tmp_path: Path) -> None:
    prompts, settings = prompts_of(49152)[::2], {"compute": "exact"}
    with rank_processes(command(default_model, settings, prompts, 8), 3, tmp_path) as (leader, first, second):
        engine = load_engine(config_of(default_model, settings))
        parts = [one.read()["nbytes"] for one in (leader, first, second)]
        assert max(parts) < 0.4 * engine.runner.model.nbytes
        check_tokens(leader, engine, prompts, 8)
        # A rank that dies while nothing is computed.
        second.process.kill()
        code, said = leader.ended()
        assert code == 1
        assert "error: rank 2 of 3 has ended, and this worker can't compute without it" in said
        code, said = first.ended()
        assert code == 1
        assert "error: rank 1 of 3 ends: rank 0 has ended" in said
