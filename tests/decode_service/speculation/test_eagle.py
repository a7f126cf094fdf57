"""EAGLE heads around a real engine: they load as published, draft what the reference does, and change no token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_engine import PROMPTS, run
from tiny_eagle import ReferenceHead, save_tiny_eagle
from tiny_llama import save_tiny_llama

from decode_service import wiring
from decode_service.flags import parse_flags
from decode_service.speculation.draft import DraftProposer
from decode_service.speculation.proposer import Ask, Draft
from engine.batch import Slice
from engine.config import EngineConfig
from engine.loading import load_engine
from engine.models.meta import Taps
from engine.runner import build_meta
from tandem.errors import ConfigError

HEADS: dict[str, dict[str, Any]] = {
    "eagle-1": {"version": 1},
    "eagle-1-bias": {"version": 1, "bias": True},
    "eagle-3": {"version": 3, "taps": [1, 2, 3]},
    "eagle-3-default-taps": {"version": 3},
    "eagle-3-narrow": {"version": 3, "taps": [0, 1, 3], "width": 32},
    "eagle-3-normed": {"version": 3, "taps": [1, 2, 3], "norm_before_residual": True},
}
LAYERS = 6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine OpenMP barriers slow small steps tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("target"), layers=LAYERS)


def features_of(target: Path, taps: Sequence[int], tokens: list[int]) -> torch.Tensor:
    """What the target gives of `tokens` in one go: [len, F]."""
    engine = load_engine(EngineConfig(model=str(target), num_blocks=32, threads=1))
    ids, meta = build_meta([Slice("r", tokens, 0, list(range(32)))], 16)
    wanted = Taps(tuple(taps))
    engine.runner.model.forward(ids, meta, engine.kv_cache, wanted)  # type: ignore[union-attr]
    return torch.cat(wanted.kept, 1)


@pytest.mark.parametrize("name", HEADS)
def test_drafts_are_those_of_the_reference_and_change_no_token(
    name: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = save_tiny_eagle(tmp_path, **HEADS[name])
    common = ("--model", str(target), "--compute", "exact", "--no-prefix-cache")
    seen: list[tuple[list[int], list[int]]] = []
    propose = DraftProposer.propose

    def recording(self: DraftProposer, asks: Sequence[Ask]) -> list[Draft]:
        self._least = 0.0  # a random head is never sure
        drafts = propose(self, asks)
        seen.extend(
            ([*ask.prompt, *ask.output], list(draft.token_ids))
            for ask, draft in zip(asks, drafts, strict=True)
            if ask.params.greedy and draft.token_ids
        )
        return drafts

    monkeypatch.setattr(DraftProposer, "propose", recording)
    flags = ("--eagle-head", str(head), "--speculation", "eagle", "--speculation-fixed", "--speculation-tokens", "3")
    tokens, counts, pool = run(*common, *flags)
    assert tokens == run(*common, "--speculation", "off")[0]
    assert counts["eagle"].drafts > 100
    assert pool.num_free == pool.num_blocks
    reference, version = ReferenceHead(head, target), HEADS[name]["version"]
    taps = HEADS[name].get("taps", [2, LAYERS // 2, LAYERS - 3]) if version == 3 else []
    assert len({len(known) for known, _ in seen if known[: len(PROMPTS[1])] == PROMPTS[1]}) > 5
    for known, draft in seen[:: max(1, len(seen) // 25)]:
        assert reference.draft(known, features_of(target, taps, known)[:-1], len(draft)) == draft


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("eagle-1", {"vocab_size": 300}, r"vocab_size: 300, the model has 211 token ids"),
        ("eagle-1", {"num_hidden_layers": 2}, r"num_hidden_layers: must be 1 in an EAGLE head, not 2"),
        ("eagle-3", {"draft_vocab_size": 99}, r"tensor lm_head.weight has shape \[100, 64\]; expected \[99, 64\]"),
        ("eagle-3", {"taps": [1, 2, 6]}, r"must be a list of layers below the model's 6, not \[1, 2, 6\]"),
        ("eagle-3-narrow", {"target_hidden_size": 128}, r"target_hidden_size: 128, the model's is 64"),
    ],
)
def test_a_head_for_another_model_is_refused(
    name: str, changes: dict[str, Any], message: str, target: Path, tmp_path: Path
) -> None:
    head = save_tiny_eagle(tmp_path, **{**HEADS[name], **changes})
    flags = parse_flags(["--model", str(target), "--compute", "exact", "--num-blocks", "16", "--eagle-head", str(head)])
    with pytest.raises(ConfigError, match=f"--eagle-head: .*{message}"):
        wiring.load(flags)


def test_what_is_no_head_is_refused(target: Path) -> None:
    flags = ["--model", str(target), "--num-blocks", "16", "--eagle-head", str(target)]
    with pytest.raises(ConfigError, match=r"--eagle-head: .*num_hidden_layers"):
        wiring.load(parse_flags([*flags, "--compute", "exact"]))
    with pytest.raises(ConfigError, match="--eagle-head: compute int8 keeps no hidden states"):
        wiring.load(parse_flags([*flags, "--compute", "int8"]))
