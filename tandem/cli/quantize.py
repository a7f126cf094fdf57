"""`tandem quantize`: a smaller copy of a model, rounded to nearest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from tandem.models import resolve_model
from tandem.supervisor.settings import environment


@click.command("quantize")
@click.option("--format", "form", type=click.Choice(["int4", "int8", "fp8"]), required=True, help="Of linear layers.")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
def command(form: str, model: str, out: Path) -> None:
    """Quantise MODEL (a Hugging Face folder, or hub:ORG/NAME) to the new folder OUT, round to nearest.

    OUT is in compressed-tensors' form: int4 in groups (W4A16), int8 a row with dynamic int8 activations (W8A8), or FP8
    a row with dynamic FP8 activations. The LM head and embeddings stay as they are. Calibrated formats (GPTQ, AWQ,
    AutoRound) come from their own tools; Tandem serves them too.
    """
    # A process of its own, because the CLI imports no torch. It says itself what went wrong.
    words = [sys.executable, "-P", "-m", "engine", "quantize", form, str(resolve_model(model)), str(out)]
    code = subprocess.run(words, stdin=subprocess.DEVNULL, env=environment(), check=False).returncode  # noqa: S603
    if code:
        sys.exit(code)
    print(f"{out}: serve it with --model {out}")
