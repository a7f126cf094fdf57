"""The engine's tokens on a GPU beside transformers, on a small model with random weights: `python -m bench.gpu_tokens`.

Tokens of 16-bit models differ where two logits are closer than rounding. So every token that the engine draws greedily
is looked up in transformers' float32 logits for the same context: how far below the largest is it? transformers' own
choice in 16 bits is measured likewise, and the engine's may be a little further off at most; with keys and values of 8
bits (`--kv-dtype`) it may be off by what their rounding is good for. Steps that are replayed, eager, and launched ahead
must draw the same tokens, and drafts that are what was drawn before must stand.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from torch import Tensor

from bench.random_weights import PREFIX, SHAPES, RandomCheckpoint
from bench.sequences import GREEDY, BenchSequence, SequenceDriver, load_bench_engine
from engine.batch import Batch, SampleSpec, Slice
from engine.config import ModelConfig

PROMPTS = ((4, 7), (8, 64), (3, 700))
"""(sequences, tokens of each)."""
OUTPUT_TOKENS = 48
SLACK = 3.0
"""How much further from float32's choice than transformers' own in 16 bits a token may be."""
MOST_WITH_CODES = 0.5
"""How far with keys and values of 8 bits, in standard deviations: a wrong scale or position is off by several."""
DRAFTS = 3
STANDING = 0.95
"""Share of drafts that must stand: products over other numbers of rows may round otherwise."""
Drawn = list[list[int]]


def main() -> int:
    """Command line; the exit status is 1 when something differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_tokens", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="smol-135m", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--kv-dtype", default="auto", help="of the KV cache: that of --dtype, int8 or fp8_e4m3")
    given = parser.parse_args()
    settings = {"device": "cuda", "dtype": given.dtype, "kv_dtype": given.kv_dtype}
    drawn = {way: _generate(given.shape, settings, way) for way in ("eager", "graphs", "ahead")}
    same = {way: _share_of_equal(drawn["eager"], drawn[way]) for way in ("graphs", "ahead")}
    gaps = _gaps(given.shape, given.dtype, drawn["graphs"])
    standing = _standing(given.shape, settings, drawn["graphs"])
    most = SLACK * gaps["transformers"] + 1e-6 if given.kv_dtype == "auto" else MOST_WITH_CODES
    # Graphs pad their products, so that a library may choose another kernel for them; launching ahead changes nothing.
    good = gaps["engine"] <= most and drawn["ahead"] == drawn["graphs"] and standing >= STANDING
    found = {"same_as_eager": same, "worst_gap": gaps, "drafts_standing": round(standing, 4), "ok": good}
    print(json.dumps({"dtype": given.dtype, "kv_dtype": given.kv_dtype, **found}), flush=True)
    return 0 if good else 1


def _generate(shape: str, settings: dict[str, Any], way: str) -> Drawn:
    """Prompt and output of every sequence."""
    sizes = {"graphs": way != "eager", "max_sequences": 8}
    engine = load_bench_engine(PREFIX + shape, {**settings, **sizes}, 512, 4096)
    engine.runner.warm_up()
    driver, found = SequenceDriver(engine, 512), []
    for count, length in PROMPTS:
        with driver.sequences(count, length) as sequences:
            driver.prefill(sequences)
            if way == "ahead":
                driver.decode_ahead(sequences, OUTPUT_TOKENS - 1)
            else:
                for _ in range(OUTPUT_TOKENS - 1):
                    driver.decode(sequences)
            found += [list(sequence.tokens) for sequence in sequences]
    return found


def _standing(shape: str, settings: dict[str, Any], drawn: Drawn) -> float:
    """The share of drafts that stand, in captured steps, when each is what was `drawn` there without drafts."""
    rows = (1 + DRAFTS) * max(count for count, _ in PROMPTS)
    engine = load_bench_engine(PREFIX + shape, {**settings, "max_sequences": rows}, 512, 4096)
    engine.runner.warm_up()
    driver, known, standing, drafts = SequenceDriver(engine, 512), iter(drawn), 0, 0
    for count, length in PROMPTS:
        with driver.sequences(count, length) as sequences:
            driver.prefill(sequences)
            tokens = [next(known) for _ in sequences]
            for first in range(length, length + OUTPUT_TOKENS - DRAFTS - 1, DRAFTS + 1):
                slices = [_with_drafts(s, all_, first) for s, all_ in zip(sequences, tokens, strict=True)]
                output = engine.runner.run(Batch(slices))
                standing += sum(len(samples) - 1 for samples in output.samples)
                drafts += DRAFTS * count
    return standing / drafts


def _with_drafts(sequence: BenchSequence, tokens: list[int], first: int) -> Slice:
    """The token at `first`, which is known, and as many behind it as drafts."""
    end = first + DRAFTS + 1
    sequence.table.ensure(end)
    specs = [SampleSpec(0, GREEDY, place + 1 - sequence.prompt_len) for place in range(first, end)]
    return Slice("bench", tokens[first:end], first, sequence.table.blocks, specs, drafts=DRAFTS)


def _share_of_equal(one: Drawn, other: Drawn) -> float:
    mine, others = ([t for tokens in drawn for t in tokens[-OUTPUT_TOKENS:]] for drawn in (one, other))
    return sum(a == b for a, b in zip(mine, others, strict=True)) / len(mine)


def _gaps(shape: str, dtype: str, sequences: Drawn) -> dict[str, float]:
    """The furthest that a token is below float32's largest logit, in standard deviations of the logits."""
    exact, rounded = _reference(shape, torch.float32), _reference(shape, getattr(torch, dtype))
    worst = {"engine": 0.0, "transformers": 0.0}
    for tokens in sequences:
        context = torch.tensor([tokens[:-1]], device="cuda")
        with torch.inference_mode():
            logits = exact(context).logits[0, -OUTPUT_TOKENS:].float()
            choice = rounded(context).logits[0, -OUTPUT_TOKENS:].float().argmax(-1)
        engine = torch.tensor(tokens[-OUTPUT_TOKENS:], device="cuda")
        for name, chosen in (("engine", engine), ("transformers", choice)):
            worst[name] = max(worst[name], _furthest(logits, chosen))
    return {name: round(value, 5) for name, value in worst.items()}


def _furthest(logits: Tensor, chosen: Tensor) -> float:
    below = logits.max(-1).values - logits.gather(1, chosen[:, None])[:, 0]
    return float((below / logits.std(-1)).max())


def _reference(shape: str, dtype: torch.dtype) -> Any:
    """transformers' model of the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: ModelConfig = SHAPES[shape]
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope.theta,  # before transformers 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
        "tie_word_embeddings": False,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**settings))
    checkpoint = RandomCheckpoint(shape, "cuda")
    model.load_state_dict({name: checkpoint.tensor(name).float().cpu() for name in checkpoint.names()})
    return model.eval().to("cuda", dtype)


if __name__ == "__main__":
    sys.exit(main())
