"""One rank of an engine, told by the environment: rank 0 answers the prompts of its command line, then takes a step for
each line of standard input. Each rank says first what it holds."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from greedy_steps import config_of, greedy

from engine.loading import load_engine
from engine.parallel.group import join_ranks
from engine.parallel.world import world_from


def main() -> None:
    """`MODEL JSON`: the settings, the prompts, and how many tokens."""
    model, wanted = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = world_from(os.environ)
    assert world is not None
    ranks = join_ranks(world)
    engine = load_engine(config_of(model, wanted["settings"], ranks.size), ranks=ranks)
    _say({"nbytes": engine.runner.model.nbytes, "numerics": engine.numerics_id, "model": engine.model_id})
    if not ranks.leads:
        assert engine.follow is not None
        engine.follow()
        return
    prompts, count = wanted["prompts"], wanted["count"]
    together = greedy(engine, prompts, count, 64)
    alone = [greedy(engine, [prompt], count, 5)[0] for prompt in prompts]
    _say({"together": [asdict(one) for one in together], "alone": [asdict(one) for one in alone]})
    for _ in sys.stdin:
        engine.runner.warm_up()
    ranks.close()


def _say(what: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


main()
