"""The engine's device path with FlashInfer and FlashAttention, which fakes stand for: torch's tokens, and graphs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from attention_packages import FAKES, install

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

import fake_flashinfer_plan
from gpu_stand_in import device, load
from recording_graphs import RecordingGraphs

from engine.batch import Batch, SampleSpec, Slice
from engine.runner import Runner
from kernels import flashinfer_attention
from tandem.errors import ConfigError
from tandem.record import SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")
GREEDY = SamplingParams(temperature=0.0)
PROMPTS = [[5, 17, 3, 99, 200, 41, 8, 8, 150, 7, 12], [1, 2, 3], [77] * 9]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All fakes, of which FlashInfer takes the tiny model's heads too."""
    monkeypatch.delenv("TANDEM_ATTENTION", raising=False)
    monkeypatch.setattr(flashinfer_attention, "WORKSPACE_BYTES", 1024)
    monkeypatch.setattr(flashinfer_attention, "HEAD_DIMS", (16,))
    monkeypatch.setattr(fake_flashinfer_plan, "HEAD_DIMS", {16})
    for name in FAKES:
        install(monkeypatch, tmp_path, name)


def generate(runner: Runner, count: int, blocks: int, chunk: int = 6) -> list[list[int]]:
    """All prompts side by side in chunks, those that are through decoding meanwhile; each has `blocks` blocks."""
    done: list[list[int]] = [[] for _ in PROMPTS]
    computed = [0] * len(PROMPTS)
    while any(len(tokens) < count for tokens in done):
        slices = []
        for s, prompt in enumerate(PROMPTS):
            known = [*prompt, *done[s]]
            end = min(len(known), computed[s] + chunk)
            samples = [SampleSpec(0, GREEDY, len(done[s]), prompt, done[s])] if end == len(known) else []
            table = list(range(blocks * s + blocks - 1, blocks * s - 1, -1))
            slices.append(Slice(f"s{s}", known[computed[s] : end], computed[s], table, samples))
            computed[s] = end
        for tokens, drawn in zip(done, runner.run(Batch(slices)).samples, strict=True):
            tokens += [token.token_id for token in drawn]
    return [tokens[:count] for tokens in done]


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.usefixtures("packages")
def test_tokens_are_those_of_torch(name: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_GPU_KERNELS", "torch")
    size = 256 if name == "flash-attn-2" else 4
    sizes: dict[str, Any] = {"dtype": "float16", "block_size": size, "num_blocks": 32}
    engines = [load(tiny_model, attention=attention, **sizes) for attention in ("torch", name)]
    want, got = (generate(engine.runner, 6, 1 if size == 256 else 8) for engine in engines)
    assert got == want
    assert len({token for tokens in want for token in tokens}) > 5
    assert f"-{name}-{FAKES[name][2]}" in engines[1].numerics_id
    assert engines[0].numerics_id != engines[1].numerics_id


@pytest.mark.parametrize("name", ["flashinfer", "flash-attn-3"])
@pytest.mark.usefixtures("packages")
def test_replayed_steps_draw_what_eager_ones_do(name: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay is planned; of two buckets, and of contexts that grow past blocks' ends."""
    want = generate(load(tiny_model, dtype="float16", attention=name, graphs=False).runner, 6, 8)
    graphs = RecordingGraphs(monkeypatch)
    engine = load(tiny_model, device(graphs), dtype="float16", attention=name, max_sequences=4)
    assert generate(engine.runner, 6, 8) == want
    assert graphs.captures >= 1
    assert graphs.replays >= 4


@pytest.mark.parametrize("name", ["flashinfer", "flash-attn-3"])
@pytest.mark.usefixtures("packages")
def test_replayed_steps_verify_drafts(name: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draft is planned as a sequence that has its blocks in common with the row before it."""
    want = generate(load(tiny_model, dtype="float16", attention=name, graphs=False).runner, 6, 8)[0]
    graphs = RecordingGraphs(monkeypatch)
    runner = load(tiny_model, device(graphs), dtype="float16", attention=name, max_sequences=4).runner
    prompt, done = PROMPTS[0], list[int]()
    for known, drafts in ((prompt, []), (want[:1], want[1:4]), (want[4:5], [])):
        end = len(done) + len(drafts) + 1
        specs = [SampleSpec(0, GREEDY, place, prompt, want[:place]) for place in range(len(done), end)]
        start = len(prompt) + len(done) - len(known)
        part = Slice("r", [*known, *drafts], start, [7, 6, 5, 4], specs, drafts=len(drafts))
        done += [token.token_id for token in runner.run(Batch([part])).samples[0]]
    assert done == want
    assert graphs.replays == 2


@pytest.mark.usefixtures("packages")
def test_what_was_asked_for_and_can_not_be_had_stops_the_start(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"--attention: flashinfer can't be had: it takes float16 or bfloat16"):
        load(tiny_model, attention="flashinfer")
    assert load(tiny_model).numerics_id.split("/")[-2] == "attention-triton"


@pytest.mark.usefixtures("packages")
def test_codes_of_eight_bits_are_left_to_triton(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"flashinfer can't be had: .* values of torch.int8; usable here: triton"):
        load(tiny_model, dtype="float16", kv_dtype="int8", attention="flashinfer")
    wide, narrow = load(tiny_model, dtype="float16"), load(tiny_model, dtype="float16", kv_dtype="int8")
    assert "/kv-float16/" in wide.numerics_id
    assert "/attention-flashinfer-" in wide.numerics_id
    assert "/kv-int8/" in narrow.numerics_id
    assert "/attention-triton/" in narrow.numerics_id
