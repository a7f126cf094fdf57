"""What is drawn, over 20,000 draws, has the probabilities that it should have: and wrong samplers are found out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from chi_square import REJECTED, kept_probabilities, p_value, tail

from engine.batch import Batch, SampleSpec, Slice
from engine.loading import Engine
from engine.models.meta import Predictions
from engine.runner import build_meta, sampled_rows
from engine.sampler import sample
from kernels import sampling
from kernels.sampling import Draw, draw_tokens
from tandem.record import SamplingParams

ROW = np.random.default_rng(11).normal(0.0, 2.0, 24)
COUNT = 20_000
SETTINGS = list(itertools.product((0.7, 1.3), (0.9, 1.0)))
PROMPT = [3, 141, 59, 26]


def by_position(i: int, params: SamplingParams) -> SampleSpec:
    return SampleSpec(0, params, i)


def by_seed(i: int, params: SamplingParams) -> SampleSpec:
    return SampleSpec(0, replace(params, seed=i), 0)


def by_index(i: int, params: SamplingParams) -> SampleSpec:
    return SampleSpec(i, params, 0)


def drawn_counts(params: SamplingParams, spec: Callable[[int, SamplingParams], SampleSpec]) -> Any:
    logits = torch.tensor(ROW[None], dtype=torch.float32)
    drawn = draw_tokens(logits, [Draw(0, spec(i, params)) for i in range(COUNT)])
    return np.bincount([item.token_id for item in drawn], minlength=len(ROW))


# Critical values at 0.001: NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.4.
@pytest.mark.parametrize(
    ("freedom", "critical"), [(1, 10.828), (2, 13.816), (3, 16.266), (10, 29.588), (23, 49.728), (50, 86.661)]
)
def test_the_tail_is_the_tabled_one(freedom: int, critical: float) -> None:
    assert tail(critical, freedom) == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("spec", [by_position, by_seed, by_index])
@pytest.mark.parametrize(("temperature", "top_p"), SETTINGS)
def test_frequencies(temperature: float, top_p: float, spec: Callable[[int, SamplingParams], SampleSpec]) -> None:
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=2024)
    assert p_value(drawn_counts(params, spec), kept_probabilities(ROW, temperature, top_p)) > REJECTED


@pytest.mark.parametrize(
    "wrong",
    [
        SamplingParams(temperature=0.75, top_p=0.9),
        SamplingParams(temperature=0.65, top_p=0.9),
        SamplingParams(temperature=0.7, top_p=0.97),
        SamplingParams(temperature=0.7, top_p=0.8),
        SamplingParams(temperature=0.7, top_p=0.9, logit_bias={int(ROW.argmax()): 0.1}),
    ],
)
def test_frequencies_reject_a_wrong_sampler(wrong: SamplingParams) -> None:
    assert p_value(drawn_counts(wrong, by_position), kept_probabilities(ROW, 0.7, 0.9)) < REJECTED


def neighbours(params: SamplingParams) -> Any:
    """How often which two tokens came at positions 0 and 1 of one seed: [V, V]."""
    specs = [SampleSpec(0, replace(params, seed=i // 2), i % 2) for i in range(2 * COUNT)]
    drawn = draw_tokens(torch.tensor(ROW[None], dtype=torch.float32), [Draw(0, spec) for spec in specs])
    tokens = np.array([item.token_id for item in drawn]).reshape(COUNT, 2)
    return np.bincount(tokens @ [len(ROW), 1], minlength=len(ROW) ** 2)


def test_neighbouring_positions_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=1.3, top_p=0.9)
    one = kept_probabilities(ROW, 1.3, 0.9)
    assert p_value(neighbours(params), np.outer(one, one)) > REJECTED
    with_position = sampling.noise_key
    monkeypatch.setattr(sampling, "noise_key", lambda seed, index, position: with_position(seed, index, 0))
    assert p_value(neighbours(params), np.outer(one, one)) < REJECTED


def test_neighbouring_draws_of_one_seed_are_independent() -> None:
    logits = torch.zeros(1, 8)
    drawn = draw_tokens(logits, [Draw(0, by_position(i, SamplingParams(seed=9))) for i in range(COUNT)])
    pairs = [8 * a.token_id + b.token_id for a, b in itertools.pairwise(drawn)]
    assert p_value(np.bincount(pairs, minlength=64), np.full(64, 1 / 64)) > REJECTED


@pytest.mark.parametrize(("temperature", "top_p"), SETTINGS)
def test_a_step_draws_what_its_model_says(make_engine: Callable[..., Engine], temperature: float, top_p: float) -> None:
    """Through runner and model: 20,000 outputs of one prompt, drawn from its last row in one step."""
    engine = make_engine(compute="exact")
    specs = [SampleSpec(i, SamplingParams(temperature=temperature, top_p=top_p, seed=5), 0) for i in range(COUNT)]
    (drawn,) = engine.runner.run(Batch([Slice("r", PROMPT, 0, [0], specs)])).samples
    counts = np.bincount([item.token_id for item in drawn], minlength=engine.model_config.vocab_size)
    right = kept_probabilities(prompt_logits(engine), temperature, top_p)
    assert p_value(counts, right) > REJECTED
    assert p_value(counts, kept_probabilities(prompt_logits(engine), temperature + 0.1, top_p)) < REJECTED


def prompt_logits(engine: Engine) -> Any:
    """The model's logits [V] after PROMPT."""
    part = Slice("r", PROMPT, 0, [0], [SampleSpec(0, SamplingParams(), 0)])
    token_ids, meta = build_meta([part], engine.engine_config.block_size)
    return (
        engine.runner.model.step(token_ids, meta, engine.kv_cache, sampled_rows([part], meta))
        .logits[0]
        .double()
        .numpy()
    )


def test_rows_of_a_step_draw_each_from_its_own_logits() -> None:
    """20,000 sequences in one step, half of them with other logits."""
    rows = np.stack([ROW, ROW[::-1]])
    logits = torch.tensor(rows, dtype=torch.float32).repeat(COUNT // 2, 1)
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=8)
    slices = [Slice("r", [0], 0, [0], [SampleSpec(0, params, i)]) for i in range(COUNT)]
    drawn = [item.token_id for (item,) in sample(Batch(slices), Predictions(logits)).samples]
    for row in range(2):
        counts = np.bincount(drawn[row::2], minlength=len(ROW))
        assert p_value(counts, kept_probabilities(rows[row], 0.7, 0.9)) > REJECTED
        assert p_value(counts, kept_probabilities(rows[1 - row], 0.7, 0.9)) < REJECTED
