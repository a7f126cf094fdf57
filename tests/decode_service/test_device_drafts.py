"""Drafts in a scheduler over the device path: verified by replayed graphs, with the tokens and the blocks of none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from decode_scheduling import VOCAB, Driver, Knowing, make_record
from tiny_llama import save_tiny_llama

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "engine" / "core"))  # tests are no package

from gpu_stand_in import device, load
from recording_graphs import RecordingGraphs

from decode_service.speculation.config import SpeculationConfig

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")
REQUESTS = ("0", "1")


def serve(runner: Any, speculation: SpeculationConfig | None = None) -> Driver:
    """Two requests to their ends; all blocks are free again behind them."""
    driver = Driver(num_blocks=32, speculation=speculation, max_sequences=8, max_drafts=8, max_context=256)
    driver.runner = runner
    for key in REQUESTS:
        driver.admit(key, make_record(6, max_tokens=7, seed=int(key)))
    driver.run()
    driver.assert_empty()
    return driver


def test_drafts_are_verified_by_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three drafts are right, so a verifying step leaves slots to be given back or written over."""
    model = save_tiny_llama(tmp_path, vocabulary=VOCAB)
    alone = serve(load(model, graphs=False).runner)
    want = {key: alone.seen[key].output(0) for key in REQUESTS}
    graphs = RecordingGraphs(monkeypatch)
    proposer = Knowing(lambda key: want[key.request], lambda ask: 2)
    drafting = SpeculationConfig([proposer], max_tokens=3, fixed=True)
    driver = serve(load(model, device(graphs)).runner, drafting)
    assert {key: driver.seen[key].output(0) for key in REQUESTS} == want
    assert driver.seen["0"].accepted == 4  # seven tokens: the first, and two steps of three
    assert graphs.replays == 2
