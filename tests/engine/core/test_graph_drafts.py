"""Drafts in captured steps: rows like others, so the tokens are those of steps of one row, and graphs are shared."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from gpu_stand_in import device, load
from recording_graphs import RecordingGraphs

from engine.batch import Batch, SampledToken, SampleSpec, Slice
from engine.placing import place
from engine.runner import Runner
from tandem.record import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.1, top_p=0.95, seed=12)
PENALISED = SamplingParams(temperature=0.9, seed=5, presence_penalty=0.4)
PROMPT = [5, 17, 3, 99, 200]
TABLE = [9, 2, 6, 4]
TOKENS = 7


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> RecordingGraphs:
    return RecordingGraphs(monkeypatch)


def drafted(params: SamplingParams, output: list[int], drafts: list[int], table: list[int] = TABLE) -> Slice:
    """The last token of `output`, and drafts behind it."""
    known = [*output, *drafts]
    places = range(len(output), len(known) + 1)
    specs = [SampleSpec(1, params, place, PROMPT, known[:place], logprobs=0) for place in places]
    return Slice("r", [output[-1], *drafts], len(PROMPT) + len(output) - 1, table, specs, drafts=len(drafts))


def prefill(runner: Runner, params: SamplingParams) -> list[SampledToken]:
    spec = SampleSpec(1, params, 0, PROMPT, logprobs=0)
    return list(runner.run(Batch([Slice("r", PROMPT, 0, TABLE, [spec])])).samples[0])


def plain(runner: Runner, params: SamplingParams) -> list[SampledToken]:
    """One row a step."""
    done = prefill(runner, params)
    while len(done) < TOKENS:
        done += runner.run(Batch([drafted(params, [token.token_id for token in done], [])])).samples[0]
    return done


def near(got: list[SampledToken], want: list[SampledToken]) -> bool:
    """The same tokens; products over other numbers of rows may round otherwise."""
    shares = [[token.logprobs.logprob for token in drawn if token.logprobs] for drawn in (got, want)]
    same = [token.token_id for token in got] == [token.token_id for token in want]
    return same and len(shares[0]) == len(got) and shares[0] == pytest.approx(shares[1], abs=5e-3)


@pytest.mark.parametrize(
    ("params", "right", "kv_dtype"),
    [(GREEDY, 0, "float32"), (GREEDY, 3, "int8"), (SAMPLED, 1, "float32"), (SAMPLED, 3, "float32")],
)
def test_drafts_change_no_token(
    tiny_model: Path, graphs: RecordingGraphs, params: SamplingParams, right: int, kv_dtype: str
) -> None:
    """Some or all of three drafts are right; slots of wrong ones are written over. A chunk beside them, as local
    prefill has it, makes its step an eager one; what was captured goes on behind it."""
    engine = load(tiny_model, device(graphs), max_sequences=8, kv_dtype=kv_dtype)
    want = plain(load(tiny_model, graphs=False, kv_dtype=kv_dtype).runner, params)
    ids, done, steps = [token.token_id for token in want], prefill(engine.runner, params), 0
    other = Slice("other", [9], 2, [30], [SampleSpec(0, SAMPLED, 4, PROMPT)])
    engine.runner.run(Batch([Slice("other", [9, 9], 0, [30])]))
    while len(done) < TOKENS:
        rest = ids[len(done) :]
        drafts = [*rest[:right], *((token + 1) % 200 for token in rest[right:])][: min(3, len(rest) - 1)]
        chunk = [Slice("chunk", [7, 7], 0, [31])] if steps == 1 else []
        part = drafted(params, ids[: len(done)], drafts)
        output = engine.runner.run(Batch([other, part, *chunk]))
        assert len(output.samples[1]) == min(right, len(drafts)) + 1
        done += output.samples[1]
        steps += 1
    assert near(done, want)
    assert graphs.replays == steps - 1
    assert graphs.captures <= 3


def test_rows_of_a_step_share_a_graph_with_sequences(tiny_model: Path, graphs: RecordingGraphs) -> None:
    """Four rows are four rows, whosever they are; padding writes nothing."""
    engine = load(tiny_model, device(graphs), max_sequences=8)
    rows = [Slice(f"s{s}", [7], 0, [s], [SampleSpec(0, GREEDY, 0, [7])]) for s in range(4)]
    engine.runner.run(Batch(rows))
    prefill(engine.runner, GREEDY)
    before = engine.kv_cache.blocks.clone()
    engine.runner.run(Batch([drafted(GREEDY, [8], [3, 4])]))
    changed = (engine.kv_cache.blocks != before).any(1).nonzero().flatten().tolist()
    assert changed == [2]  # positions 5, 6 and 7
    assert (graphs.captures, graphs.replays) == (1, 2)


def test_what_no_graph_holds_runs_eagerly(tiny_model: Path, graphs: RecordingGraphs) -> None:
    """More rows than the largest bucket, or draws that edit logits."""
    runner = load(tiny_model, device(graphs), max_sequences=2).runner
    for params, drafts in ((GREEDY, [3, 4, 5]), (PENALISED, [3])):
        prefill(runner, params)
        runner.run(Batch([drafted(params, [8], drafts)]))
    assert (graphs.captures, graphs.replays) == (0, 0)


def test_rows_are_placed_one_by_one() -> None:
    """Each sees its own position and all before it, by its sequence's table."""
    placing = place([Slice("a", [5, 6, 7], 3, [2, 8]), Slice("b", [1], 9, [0, 3, 1])], 4)
    rows = placing.row_by_row()
    assert rows.one_each
    assert rows.row_by_row() is rows
    assert rows.context_lens.tolist() == [4, 5, 6, 10]
    assert rows.query_starts.tolist() == [0, 1, 2, 3, 4]
    assert rows.block_tables.tolist() == [[2, 8, 0], [2, 8, 0], [2, 8, 0], [0, 3, 1]]
    assert (rows.context_lens.dtype, rows.query_starts.dtype, rows.block_tables.dtype) == (np.int32,) * 3
    for name in ("token_ids", "positions", "slots"):
        assert getattr(rows, name) is getattr(placing, name)
