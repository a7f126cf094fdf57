"""What llama.cpp's own products cost in quality, on the text of `bench.quality` and the same weights.

    python -m bench.peers.llamacpp_quality

llama.cpp computes the GGUF file's weights twice: expanded to float32, and as they are, with its 8-bit activations. Its
llama-perplexity compares the two: perplexity over the second half of each window of 1,024 tokens (its own rule), and
how often the likeliest token is the same. Needs the peer's environment (`make bench-peers PEERS=llamacpp`), and two
gigabytes of temporary space.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.peers.environments import PeerError, ensure_environment, peer_python
from bench.peers.llamacpp import PEER
from bench.peers.session import cpus
from bench.quality import WINDOW, text_tokens
from gateway.tokenizer import load_tokenizer
from tandem.errors import ConfigError
from tandem.models import resolve_model

FIGURES = {
    "perplexity_float32": r"Mean PPL\(base\)\s*:\s*([\d.]+)",
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "greedy_agreement_percent": r"Same top p\s*:\s*([\d.]+)",
}
_FIND = "from bench.peers.llamacpp import programs; print(programs())"


def read_figures(output: str) -> dict[str, float]:
    """The comparison that llama-perplexity printed. Raises PeerError when it printed none."""
    found = {name: re.search(pattern, output) for name, pattern in FIGURES.items()}
    if missing := [name for name, match in found.items() if match is None]:
        raise PeerError(f"llama-perplexity printed no {', '.join(missing)}: {output.strip()[-300:]}")
    figures = {name: float(match.group(1)) for name, match in found.items() if match is not None}
    figures["change_percent"] = round((figures["perplexity"] / figures["perplexity_float32"] - 1) * 100, 3)
    return figures


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout + done.stderr


def measure(model: Path, tokens: int) -> dict[str, float]:
    """Figures of llama.cpp on `tokens` tokens of the text."""
    ensure_environment(PEER)
    programs = Path(_run([peer_python(PEER), "-c", _FIND]).strip())
    tokenizer = load_tokenizer(model)
    text = "".join(tokenizer.decode(window) for window in text_tokens(str(model), tokens))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").write_text(text, encoding="utf-8")
        _run([programs / "llama-quantize", "--allow-requantize", model, folder / "float32.gguf", "F32"])
        common: list[str | Path] = ["-f", folder / "text", "-c", str(WINDOW), "-t", str(len(cpus()))]
        common += ["--kl-divergence-base", folder / "base"]
        _run([programs / "llama-perplexity", "-m", folder / "float32.gguf", *common])
        return read_figures(_run([programs / "llama-perplexity", "-m", model, *common, "--kl-divergence"]))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.llamacpp_quality", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="default", help="default, or a path to a GGUF file")
    parser.add_argument("--tokens", type=int, default=20 * WINDOW)
    arguments = parser.parse_args()
    try:
        print(json.dumps(measure(resolve_model(arguments.model), arguments.tokens)), flush=True)
    except (PeerError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
