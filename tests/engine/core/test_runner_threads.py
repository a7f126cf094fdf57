"""`threads` counts on whichever thread runs the steps."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import torch

from engine.batch import Batch
from engine.config import EngineConfig
from engine.runner import Runner


def test_threads_are_set_on_the_engine_thread() -> None:
    """The number is OpenMP's per thread: setting it where the model was loaded is not enough."""
    kv_cache = SimpleNamespace(blocks=torch.zeros(1, 1))
    seen: list[int] = []

    def step(runner: Runner) -> None:
        runner.run(Batch([]))
        seen.append(torch.get_num_threads())

    for wanted in (1, 3):
        runner = Runner(cast(Any, None), cast(Any, kv_cache), EngineConfig(model="m", threads=wanted))
        worker = threading.Thread(target=step, args=(runner,))
        worker.start()
        worker.join()
    assert seen == [1, 3]
