"""The device path beside the CPU's engine on a tiny model: the same runner, batches and tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from gpu_stand_in import device, load

from engine.batch import Batch, SampledToken, SampleSpec, Slice, StepOutput
from engine.device.staging import BUFFERS, Layout, Staging
from engine.loading import Engine
from engine.runner import Runner
from tandem.errors import ConfigError, InternalError
from tandem.record import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")
GREEDY = SamplingParams(temperature=0.0)
PENALISED = SamplingParams(temperature=0.9, seed=5, repetition_penalty=1.3, presence_penalty=0.2, logit_bias={7: 2.0})
PARAMS = [
    GREEDY,
    SamplingParams(temperature=1.2, seed=3, top_p=0.9),
    SamplingParams(temperature=0.8, seed=4, top_k=9, min_p=0.01),
    PENALISED,
]
PROMPTS = [[5, 17, 3, 99, 200, 41, 8, 8, 150, 7, 12], [1, 2, 3], [77] * 9, [4, 210, 6, 9, 1]]


@pytest.fixture(params=["triton", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TANDEM_GPU_KERNELS", request.param)
    monkeypatch.setenv("TANDEM_ATTENTION", request.param)
    return str(request.param)


def tables(sequence: int) -> list[int]:
    """Eight blocks a sequence, in reverse."""
    return list(range(8 * sequence + 7, 8 * sequence - 1, -1))


def generate(runner: Runner, count: int, chunk: int = 6, logprobs: int | None = None) -> list[list[SampledToken]]:
    """All prompts side by side in chunks, those that are through decoding meanwhile."""
    done: list[list[SampledToken]] = [[] for _ in PROMPTS]
    computed = [0] * len(PROMPTS)
    while any(len(tokens) < count for tokens in done):
        slices = []
        for s, prompt in enumerate(PROMPTS):
            ids = [token.token_id for token in done[s]]
            known = [*prompt, *ids]
            end = min(len(known), computed[s] + chunk)
            spec = SampleSpec(0, PARAMS[s], len(ids), prompt, ids, suppress=(2,), logprobs=logprobs)
            samples = [spec] if end == len(known) else []
            slices.append(Slice(f"s{s}", known[computed[s] : end], computed[s], tables(s), samples))
            computed[s] = end
        output = runner.run(Batch(slices))
        assert output.errors == {}
        for tokens, drawn in zip(done, output.samples, strict=True):
            tokens += drawn
    return [tokens[:count] for tokens in done]


def test_tokens_are_those_of_the_cpu(make_engine: Callable[..., Engine], tiny_model: Path, kernels: str) -> None:
    want = generate(make_engine().runner, 5, logprobs=3)
    got = generate(load(tiny_model).runner, 5, logprobs=3)
    assert [[t.token_id for t in tokens] for tokens in got] == [[t.token_id for t in tokens] for tokens in want]
    assert len({t.token_id for tokens in want for t in tokens}) > 5
    pairs = zip((t for tokens in got for t in tokens), (t for tokens in want for t in tokens), strict=True)
    for one, other in pairs:
        assert one.logprobs is not None
        assert other.logprobs is not None
        assert one.logprobs.top_token_ids == other.logprobs.top_token_ids
        assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-3)


def test_float16_computes_too(tiny_model: Path) -> None:
    engine = load(tiny_model, dtype="float16")
    assert engine.kv_cache.tensor.dtype is torch.float16
    assert all(len(tokens) == 3 for tokens in generate(engine.runner, 3))
    assert "native/float16" in engine.numerics_id


@pytest.mark.parametrize(("compute", "most"), [("fp8", 0.25), ("int8", 0.12), ("int4", 1.3)])
def test_quantised_products_stay_near_the_native_ones(tiny_model: Path, compute: str, most: float) -> None:
    """Log probabilities of a prompt's likeliest next tokens; each way has a numerics id of its own."""
    spec = SampleSpec(0, GREEDY, 0, PROMPTS[0], logprobs=211)
    batch = Batch([Slice("s", PROMPTS[0], 0, tables(0), [spec])])
    engines = [load(tiny_model), load(tiny_model, compute=compute)]
    (native, rounded) = (engine.runner.run(batch).samples[0][0].logprobs for engine in engines)
    assert native is not None
    assert rounded is not None
    expected = dict(zip(native.top_token_ids, native.top_logprobs, strict=True))
    found = dict(zip(rounded.top_token_ids, rounded.top_logprobs, strict=True))
    differences = torch.tensor([found[token] - expected[token] for token in expected])
    assert 0 < differences.square().mean().sqrt() < most
    assert engines[0].numerics_id != engines[1].numerics_id
    assert f"/{compute}/" in engines[1].numerics_id
    assert engines[1].runner.model.nbytes < engines[0].runner.model.nbytes


def test_several_draws_from_one_row_edit_it_apart(make_engine: Callable[..., Engine], tiny_model: Path) -> None:
    def draw(runner: Runner) -> list[int]:
        specs = [SampleSpec(i, PENALISED, 0, PROMPTS[0], (), (i,)) for i in range(3)]
        other = Slice("t", PROMPTS[1], 0, tables(1), [SampleSpec(0, GREEDY, 0, PROMPTS[1])])
        output = runner.run(Batch([Slice("s", PROMPTS[0], 0, tables(0), specs), other]))
        return [token.token_id for tokens in output.samples for token in tokens]

    tokens = draw(load(tiny_model).runner)
    assert tokens == draw(make_engine().runner)
    assert len(tokens) == 4


def test_a_step_with_drafts_may_have_more_draws_than_can_be_followed(tiny_model: Path, kernels: str) -> None:
    """An engine for few rows keeps few tokens for the step behind: of a step with drafts none is behind."""
    known, drafts = PROMPTS[1], [7, 8, 9]
    specs = [SampleSpec(0, GREEDY, place, known, drafts[:place]) for place in range(4)]
    part = Slice("s", [*known, *drafts], 0, tables(0), specs, drafts=3)
    first = Slice("s", known, 0, tables(0), specs[:1])
    got, want = (load(tiny_model, max_sequences=1, max_step_tokens=2).runner.run(Batch([one])) for one in (part, first))
    assert got.errors == want.errors == {}
    assert got.samples[0][0] == want.samples[0][0]


def test_a_bad_slice_fails_alone(tiny_model: Path) -> None:
    engine = load(tiny_model)
    sound = SampleSpec(0, GREEDY, 0, PROMPTS[1])
    outside = SampleSpec(0, GREEDY, 0, PROMPTS[1], suppress=(211,))
    slices = [Slice("good", PROMPTS[1], 0, tables(0), [sound]), Slice("bad", PROMPTS[1], 0, tables(1), [outside])]
    output = engine.runner.run(Batch(slices))
    assert [len(drawn) for drawn in output.samples] == [1, 0]
    assert "outside the vocabulary" in str(output.errors[1])
    engine.kv_cache.tensor[tables(1)[0]] = float("nan")
    slices = [Slice(name, [9], 3, tables(s), [sound]) for s, name in enumerate(("good", "nan"))]
    output = engine.runner.run(Batch(slices))
    assert [len(drawn) for drawn in output.samples] == [1, 0]
    assert "not finite" in str(output.errors[1])


def test_copies_come_first_and_in_order(tiny_model: Path) -> None:
    runner = load(tiny_model).runner
    spec = SampleSpec(0, GREEDY, 0, PROMPTS[0])
    (want,) = runner.run(Batch([Slice("r", PROMPTS[0], 0, [0, 1, 2], [spec])])).samples
    copies = [(2, 7), (7, 8), (1, 7)]
    (got,) = runner.run(Batch([Slice("r", PROMPTS[0][10:], 10, [0, 7, 8], [spec])], copies)).samples
    assert got == want
    assert runner.run(Batch([], [(0, 1)])) == StepOutput([])


@pytest.mark.parametrize(
    "bad",
    [
        Slice("r", [], 0, [0]),
        Slice("r", [1] * 5, 0, [0]),
        Slice("r", [1], 0, [32]),
        Slice("r", [1], 0, [-1]),
        Slice("r", [211], 0, [0]),
        Slice("r", [-1], 0, [0]),
        Slice("r", [1], 256, list(range(32)) * 3),
    ],
)
def test_a_wrong_batch_is_refused_before_it_is_launched(tiny_model: Path, bad: Slice) -> None:
    with pytest.raises(InternalError):
        load(tiny_model).runner.run(Batch([Slice("ok", [1], 0, [3]), bad]))


def test_what_is_staged_arrives_and_buffers_take_turns() -> None:
    staging = Staging(device())
    sent = []
    for turn in range(2 * BUFFERS):
        arrays = {
            "a": np.arange(turn + 1, dtype=np.int64),
            "b": np.full((2, turn), turn, np.int32),
            "c": np.array([turn / 3]),
        }
        sent.append((arrays, staging.put(arrays)))
    for arrays, tensors in sent:
        assert all(np.array_equal(tensors[name].numpy(), array) for name, array in arrays.items())
    layout = Layout.of(sent[1][0])
    assert all(start % 64 == 0 for start, _, _ in layout.places.values())


def test_a_gpu_that_is_not_there_is_said(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.device.device import open_gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        open_gpu()


def test_unknown_kernels_are_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_ATTENTION", "flash")
    with pytest.raises(ConfigError, match=r"TANDEM_ATTENTION='flash' is unknown; allowed: auto, flashinfer, .*triton"):
        load(tiny_model)
