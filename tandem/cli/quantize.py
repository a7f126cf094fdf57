"""`tandem quantize`: a smaller copy of a model, rounded to nearest or calibrated by a tool of its format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from tandem.models import resolve_model
from tandem.supervisor.settings import environment

NEAREST = ("int4", "int8", "fp8")
CALIBRATED = ("gptq", "awq", "auto-round")


@click.command("quantize")
@click.option("--format", "form", type=click.Choice([*NEAREST, *CALIBRATED]), required=True, help="Of linear layers.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What gptq, awq and auto-round calibrate on: 65,000 tokens of what the model will see, as UTF-8.",
)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
def command(form: str, text: Path | None, model: str, out: Path) -> None:
    """Quantise MODEL (a Hugging Face folder, or hub:ORG/NAME) to the new folder OUT.

    int4, int8 and fp8 round to nearest, in compressed-tensors' form: int4 in groups (W4A16), int8 a row with dynamic
    int8 activations (W8A8), or FP8 a row with dynamic FP8 activations. gptq, awq and auto-round calibrate on --text, by
    their own tools, which the extras tandem-serve[gptq] (awq too) and tandem-serve[auto-round] install. The LM head and
    embeddings stay as they are.
    """
    if (form in CALIBRATED) != (text is not None):
        needs = "needs --text" if text is None else "calibrates on nothing: leave --text out"
        raise click.UsageError(f"--format {form} {needs}")
    # A process of its own, because the CLI imports no torch. It says itself what went wrong.
    words = [sys.executable, "-P", "-m", "engine", "quantize", form, str(resolve_model(model)), str(out)]
    words += [] if text is None else [str(text)]
    code = subprocess.run(words, stdin=subprocess.DEVNULL, env=environment(), check=False).returncode  # noqa: S603
    if code:
        sys.exit(code)
    print(f"{out}: serve it with --model {out}")
