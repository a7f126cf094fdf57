"""Draft models around real engines: from the flags to tokens, which are those of a worker without drafts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from decode_engine import TOKENS, run
from tiny_llama import save_tiny_llama

from decode_service import wiring
from decode_service.flags import parse_flags
from tandem.errors import ConfigError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine OpenMP barriers slow small steps tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A target of four layers, a draft model that is unlike it, and some that don't fit."""
    made = {
        "target": {"layers": 4},
        "draft": {"layers": 1, "seed": 6},
        "short": {"layers": 1, "max_context": 40},
        "other": {"vocabulary": 212},
    }
    return {name: str(save_tiny_llama(tmp_path_factory.mktemp(name), **options)) for name, options in made.items()}


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_no_token_is_changed(compute: str, models: dict[str, str]) -> None:
    common = ("--model", models["target"], "--compute", compute)
    without, _, _ = run(*common, "--speculation", "off", "--draft-model", "not even read")
    assert all(len(tokens) == TOKENS for tokens in without.values())
    drafting = ("--draft-model", models["draft"], "--self-draft-layers", "0-1,3")
    for name in ("draft", "self"):
        tokens, counts, pool = run(*common, *drafting, "--speculation", name, "--speculation-fixed")
        assert tokens == without
        assert list(counts) == [name]
        assert counts[name].draft_tokens > 0
        assert pool.num_free == pool.num_blocks


def test_a_draft_model_that_is_the_target_is_right_at_any_temperature(models: dict[str, str]) -> None:
    """Drafts are drawn with the target's own noise; only penalties of what is pending could differ, and they don't."""
    _, counts, _ = run(
        *("--model", models["target"], "--draft-model", models["target"]),
        *("--compute", "int8", "--speculation", "draft", "--speculation-fixed", "--speculation-tokens", "4"),
    )
    assert counts["draft"].draft_tokens > 100
    assert counts["draft"].accepted_tokens == counts["draft"].draft_tokens


def test_a_draft_models_context_may_be_shorter(models: dict[str, str]) -> None:
    common = ("--model", models["target"], "--compute", "exact")
    drafts = ("--draft-model", models["short"], "--speculation", "draft", "--speculation-fixed")
    assert run(*common, *drafts)[0] == run(*common, "--speculation", "off")[0]


def test_auto_takes_all_that_there_are(models: dict[str, str]) -> None:
    flags = parse_flags(["--model", models["target"], "--draft-model", models["draft"], "--num-blocks", "16"])
    loaded = wiring.load(flags)
    parts = wiring.parts_of(loaded.engine, flags, "", loaded.costs, loaded.speculation)
    assert parts.identity.proposers == ("ngram", "suffix", "draft")


def test_a_gpu_drafts_when_asked_to_and_no_more_than_its_memory_is_shared_out_for(models: dict[str, str]) -> None:
    common = ["--model", models["target"], "--num-blocks", "16", "--max-sequences", "9"]
    engine = wiring.load(parse_flags(common)).engine
    on_gpu = replace(engine, engine_config=replace(engine.engine_config, device="cuda"))
    unasked = wiring.parts_of(on_gpu, parse_flags(common), "")
    asked = wiring.parts_of(on_gpu, parse_flags([*common, "--speculation", "ngram"]), "")
    assert (unasked.identity.proposers, asked.identity.proposers) == ((), ("ngram",))
    assert asked.scheduler.max_drafts == 9
    assert wiring.parts_of(engine, parse_flags(common), "").scheduler.max_drafts is None


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--draft-model", "other", r"--draft-model: .* has 212 token ids, the model has 211; they must be the same"),
        ("--draft-model", "/nowhere", r"--draft-model: /nowhere: no such file or folder"),
        ("--self-draft-layers", "4", r"--self-draft-layers: '4' must keep 1 to 3 of the model's layers 0 to 3"),
    ],
)
def test_what_cannot_draft_is_refused_at_the_start(flag: str, value: str, message: str, models: dict[str, str]) -> None:
    flags = parse_flags(["--model", models["target"], "--num-blocks", "16", flag, models.get(value, value)])
    with pytest.raises(ConfigError, match=message):
        wiring.load(flags)
