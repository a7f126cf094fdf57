"""`make chaos`: faults on purpose, under streams that must not notice. `python tests/chaos --minutes 20 --seed 7`.

The last line is one JSON object. Exit code 1 when anything was wrong; then the seed, the faults and the processes'
logs are told, and the same seed makes the same faults again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
import tempfile
from dataclasses import asdict

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before grpc is there: broken connections are what this is about

from chaos_run import Run, Settings, Verdict

from tandem.models import resolve_model

MOST_SHOWN = 20


def _settings() -> Settings:
    parser = argparse.ArgumentParser("tests/chaos", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="default", help="default, or a path")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long faults go on")
    parser.add_argument("--seed", type=int, default=None, help="of faults and requests; drawn when not given")
    parser.add_argument("--streams", type=int, default=16, help="at a time")
    flags = parser.parse_args()
    seed = secrets.randbits(31) if flags.seed is None else flags.seed
    return Settings(resolve_model(flags.model), seed, flags.minutes * 60, flags.streams)


def _report(verdict: Verdict, log: str) -> int:
    found = asdict(verdict)
    if verdict.problems:
        print(f"\nFAILED with seed {verdict.seed}; faults:")
        for fault in verdict.fault_log:
            print(f"  {json.dumps(fault)}")
        print("problems:")
        for problem in verdict.problems[:MOST_SHOWN]:
            print(f"  {problem}")
        print(f"what the processes logged is in {log}")
    else:
        os.unlink(log)
    del found["fault_log"]
    found["problems"] = len(verdict.problems)
    print(json.dumps({"ok": not verdict.problems, **found}))
    return 1 if verdict.problems else 0


def main() -> int:
    """The exit code."""
    settings = _settings()
    print(f"seed {settings.seed}", flush=True)
    with tempfile.NamedTemporaryFile("w", prefix="tandem-chaos-", suffix=".log", delete=False) as log:
        verdict = asyncio.run(Run(settings, log).run())
    return _report(verdict, log.name)


if __name__ == "__main__":
    sys.exit(main())
