"""python -m bench.quantizers: what runs within a quantising tool's environment.

    python -m bench.quantizers tiny FOLDER                     # the small model
    python -m bench.quantizers default FOLDER                  # the default one, within Tandem's environment
    python -m bench.quantizers TOOL CASE SOURCE OUT            # quantise SOURCE; TOOL: ao, bnb, compressed, gptq...
    python -m bench.quantizers TOOL CASE SOURCE OUT --expect   # then what the tool's own inference says of OUT

`OUT/expected.safetensors` has a prompt, the 32 tokens that follow it greedily, and the logits of all but the last.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PROMPT = 16
CONTINUED = 32
PROMPTS = 8
VARIED = 10
"""Different tokens in a continuation that tells models apart."""


def clearest(model: Any, vocabulary: int) -> dict[str, torch.Tensor]:
    """As `expected`, of a few prompts the one whose tokens lead the most where they lead the least."""

    def clear(found: dict[str, torch.Tensor]) -> tuple[bool, float]:
        first, second = found["logits"][PROMPT - 1 :].topk(2).values.unbind(-1)
        return len(set(found["continuation"].tolist())) >= VARIED, float((first - second).min())

    return max((expected(model, vocabulary, seed) for seed in range(PROMPTS)), key=clear)


def expected(model: Any, vocabulary: int, seed: int) -> dict[str, torch.Tensor]:
    """Prompt int64 [P], continuation int64 [32], logits float32 [P + 31, V]."""
    ids = torch.randint(2, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        for _ in range(CONTINUED):
            logits = model(ids).logits[0].float()
            ids = torch.cat([ids, logits[-1].argmax()[None, None]], dim=1)
    return {"prompt": ids[0, :PROMPT].clone(), "continuation": ids[0, PROMPT:].clone(), "logits": logits.clone()}


def forget_places(config: Path) -> None:
    """Drop what a tool notes of how it worked, folders of this machine among it."""
    content = json.loads(config.read_text())
    content["quantization_config"].pop("meta", None)
    config.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.quantizers", description="see the module's text")
    parser.add_argument("tool", choices=["tiny", "default", "ao", "bnb", "compressed", "gptq", "rounding"])
    parser.add_argument("words", nargs="+", metavar="CASE SOURCE OUT")
    parser.add_argument("--expect", action="store_true")
    arguments = parser.parse_args()
    if arguments.tool == "tiny":
        from bench.quantizers.tiny import save_tiny

        return save_tiny(Path(arguments.words[0]))
    if arguments.tool == "default":
        from bench.quantizers.default import save_default

        return save_default(Path(arguments.words[0]))
    case, source, out = arguments.words[0], Path(arguments.words[1]), Path(arguments.words[2])
    tool = importlib.import_module(f"bench.quantizers.{arguments.tool}")
    shutil.rmtree(out, ignore_errors=True)
    tool.quantize(case, source, out)
    forget_places(out / "config.json")
    if arguments.expect:
        model = tool.load(out).eval()
        save_file(clearest(model, model.config.vocab_size), out / "expected.safetensors")
    return None


if __name__ == "__main__":
    main()
