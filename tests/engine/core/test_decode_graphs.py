"""Captured decode steps: the tokens of eager ones, nothing that a graph can't hold, and a bounded number of graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from gpu_stand_in import device, load
from recording_graphs import ForbiddenInGraphError, RecordingGraphs

from engine.batch import Batch, SampledToken, SampleSpec, Slice
from engine.device.decode_graphs import DecodeGraphs, buckets_for, contexts_for
from engine.device.steps import DeviceSteps
from engine.loading import Engine
from engine.runner import Runner
from tandem.errors import InternalError
from tandem.record import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")
GREEDY = SamplingParams(temperature=0.0)
PARAMS = [GREEDY, SamplingParams(temperature=1.2, seed=3, top_p=0.9), SamplingParams(temperature=0.9, seed=8, top_k=5)]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> RecordingGraphs:
    return RecordingGraphs(monkeypatch)


def graphs_of(engine: Engine) -> DecodeGraphs:
    steps: Any = engine.runner._steps
    assert isinstance(steps, DeviceSteps)
    assert steps.graphs is not None
    return steps.graphs


def decode(runner: Runner, sequences: int, steps: int, logprobs: int | None = None) -> list[list[SampledToken]]:
    """Prompts of different lengths, then decode steps; every other one without the last sequence."""
    prompts = [[3 + s, 20 + s, 9] * (s + 1) for s in range(sequences)]
    tables = [[4 * s + block for block in (3, 1, 0, 2)] for s in range(sequences)]
    done: list[list[SampledToken]] = [[] for _ in prompts]
    for step in range(steps + 1):
        slices = []
        for s in range(sequences if step % 2 == 0 or sequences == 1 else sequences - 1):
            ids = [token.token_id for token in done[s]]
            known = [*prompts[s], *ids]
            start = len(known) - 1 if ids else 0
            spec = SampleSpec(0, PARAMS[s % 3], len(ids), prompts[s], ids, logprobs=logprobs)
            slices.append(Slice(f"s{s}", known[start:], start, tables[s], [spec]))
        for tokens, drawn in zip(done, runner.run(Batch(slices)).samples, strict=False):
            tokens += drawn
    return done


def test_replayed_steps_draw_what_eager_ones_do(tiny_model: Path, graphs: RecordingGraphs) -> None:
    want = decode(load(tiny_model, graphs=False).runner, 3, 6, logprobs=0)
    engine = load(tiny_model, device(graphs), max_sequences=4)
    assert decode(engine.runner, 3, 6, logprobs=0) == want
    assert graphs.replays == 6
    assert graphs.captures == 2  # four rows hold three, two hold two


@pytest.mark.parametrize("captured", [True, False])
def test_a_step_launched_ahead_takes_the_tokens_of_the_last_one(
    tiny_model: Path, graphs: RecordingGraphs, captured: bool
) -> None:
    """The host gives a wrong token where it can't know better; rows may change places and leave."""
    runner = load(tiny_model, device(graphs), max_sequences=4, graphs=captured).runner
    assert runner.overlaps
    want = [[token.token_id for token in tokens] for tokens in decode(runner, 3, 4)]
    prompts = [[3 + s, 20 + s, 9] * (s + 1) for s in range(3)]
    tables = [[4 * s + block for block in (3, 1, 0, 2)] for s in range(3)]
    specs = [[SampleSpec(0, PARAMS[s], place) for place in range(3)] for s in range(3)]
    first = [Slice(f"s{s}", prompts[s], 0, tables[s], [specs[s][0]]) for s in range(3)]
    launched = [runner.launch(Batch(first))]
    before = [0, 1, 2]
    for place, order in enumerate(([2, 0, 1], [1, 2]), 1):
        rows = [
            Slice(f"s{s}", [0], len(prompts[s]) + place - 1, tables[s], [specs[s][place]], follows=before.index(s))
            for s in order
        ]
        launched.append(runner.launch(Batch(rows)))
        before = order
    drawn = [[tokens[0].token_id for tokens in step.collect().samples] for step in launched]
    assert drawn == [[want[s][0] for s in range(3)], [want[s][1] for s in (2, 0, 1)], [want[s][2] for s in (1, 2)]]


def test_a_step_on_the_cpu_follows_nothing(make_engine: Callable[..., Engine]) -> None:
    runner = make_engine().runner
    assert not runner.overlaps
    with pytest.raises(InternalError, match="follows nothing"):
        runner.run(Batch([Slice("s", [0], 0, [0], follows=0)]))


def test_what_a_graph_cannot_draw_runs_eagerly(tiny_model: Path, graphs: RecordingGraphs) -> None:
    engine = load(tiny_model, device(graphs), max_sequences=4)
    want = decode(load(tiny_model, graphs=False).runner, 2, 3, logprobs=2)
    assert decode(engine.runner, 2, 3, logprobs=2) == want
    penalised = SampleSpec(0, SamplingParams(seed=1, presence_penalty=0.5), 0, [1, 2])
    engine.runner.run(Batch([Slice("p", [2], 1, [0], [penalised])]))
    two = [SampleSpec(i, GREEDY, 0, [1, 2]) for i in range(2)]
    engine.runner.run(Batch([Slice("n", [2], 1, [0], two)]))
    assert (graphs.captures, graphs.replays) == (0, 0)


def test_warm_up_captures_the_largest_first(tiny_model: Path, graphs: RecordingGraphs) -> None:
    engine = load(tiny_model, device(graphs), max_sequences=3)
    engine.runner.run(Batch([Slice("s", [1, 2], 0, [0])]))
    told: list[tuple[int, int]] = []
    graphs_of(engine).warm_up(lambda done, wanted: told.append((done, wanted)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert list(graphs_of(engine)._captured) == [(256, 3), (256, 2), (256, 1)]
    captured = graphs.captures
    assert captured == 3
    decode(engine.runner, 3, 2)
    assert graphs.captures == captured


def test_the_graph_used_least_recently_goes(tiny_model: Path, graphs: RecordingGraphs) -> None:
    engine = load(tiny_model, device(graphs), max_sequences=4)
    held = graphs_of(engine)
    held._limit = 2
    runner = engine.runner

    def step(rows: int) -> None:
        spec = SampleSpec(0, GREEDY, 0, [1, 2])
        runner.run(Batch([Slice(f"s{s}", [2], 1, [s], [spec]) for s in range(rows)]))

    for rows in (1, 2, 1, 4):
        step(rows)
    assert (graphs.captures, len(held)) == (3, 2)
    step(1)
    assert graphs.captures == 3
    step(2)
    assert graphs.captures == 4


def test_padding_writes_nothing(tiny_model: Path, graphs: RecordingGraphs) -> None:
    engine = load(tiny_model, device(graphs), max_sequences=8)
    engine.runner.run(Batch([Slice(f"s{s}", [s, 1], 0, [s]) for s in range(5)]))
    before = engine.kv_cache.tensor.clone()
    spec = SampleSpec(0, GREEDY, 0, [1, 2])
    engine.runner.run(Batch([Slice(f"s{s}", [7], 2, [s], [spec]) for s in range(5)]))
    changed = (engine.kv_cache.tensor != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [0, 1, 2, 3, 4]
    assert graphs.replays == 1


def test_a_cpu_engine_and_graphs_off_capture_nothing(
    make_engine: Callable[..., Engine], tiny_model: Path, graphs: RecordingGraphs
) -> None:
    make_engine().runner.warm_up()
    load(tiny_model, device(graphs), graphs=False).runner.warm_up()
    assert graphs.captures == 0


def test_short_contexts_have_graphs_of_their_own(
    tiny_model: Path, graphs: RecordingGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens are the same; a graph serves every context of its class and none beyond."""
    want = decode(load(tiny_model, graphs=False).runner, 2, 12)
    monkeypatch.setattr("engine.device.decode_graphs.SHORT_CONTEXT", 8)
    engine = load(tiny_model, device(graphs), max_sequences=2)
    assert contexts_for(256) == [8, 32, 128, 256]
    assert decode(engine.runner, 2, 12) == want
    assert sorted(key.context for key in graphs_of(engine)._captured) == [8, 8, 32, 32]


@pytest.mark.parametrize("most", [1, 3, 64, 100, 256])
def test_buckets_hold_every_step_with_little_padding(most: int) -> None:
    buckets = buckets_for(most)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == most
    for rows in range(1, most + 1):
        taken = next(bucket for bucket in buckets if bucket >= rows)
        assert taken < 2 * rows or taken == 1


def test_the_recorder_fails_on_what_graphs_forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, fixed, kept = RecordingGraphs(monkeypatch), torch.zeros(4), []
    sizes = iter([2, 2, 3])
    for body, complaint in (
        (lambda: fixed.add_(1).sum().item(), "waits for the device"),
        (lambda: bool((fixed > 0).any()), "waits for the device"),
        (lambda: kept.append(fixed + 1), "outlive"),
    ):
        with pytest.raises(ForbiddenInGraphError, match=complaint):
            backend.capture(body)  # type: ignore[arg-type]
    shapes = backend.capture(lambda: torch.zeros(next(sizes)) + 1)  # type: ignore[arg-type,return-value]
    with pytest.raises(ForbiddenInGraphError, match="captured"):
        shapes.replay()
    places = iter([fixed, fixed, fixed.clone()])
    addresses = backend.capture(lambda: next(places).add_(1))  # type: ignore[arg-type,return-value]
    with pytest.raises(ForbiddenInGraphError, match="captured"):
        addresses.replay()
