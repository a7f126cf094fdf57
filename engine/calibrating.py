"""Formats that calibrate on a text, by their own tools: GPTQModel (gptq, awq) and AutoRound, of Tandem's extras.

Life cycle of a run: source and text are checked -> the tool quantises and writes OUT.part -> what it wrote is opened as
it would be to be served -> OUT.part becomes OUT. A run that fails leaves no OUT. All are 4 bits in groups of 128, 64 or
32, as `tandem quantize --format int4` has them.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from engine.quantizing import copy_texts, linear_widths, new_folder
from engine.weights import open_checkpoint
from engine.weights.rounding import FORMS
from tandem.errors import ConfigError

SAMPLES: Final = 128
"""Of the text, at most."""
LENGTH: Final = 512
"""Tokens of a sample."""
MOST_CHARACTERS: Final = SAMPLES * LENGTH * 16
"""Read of the text."""
Samples = Sequence[Sequence[int]]


def calibrate_folder(source: Path, out: Path, form: str, text: Path) -> None:
    """Write `out` from `source` in `form` (gptq, awq, auto-round), calibrated on the file `text`.

    Raises ConfigError: an unknown form, a tool that isn't installed, a text that can't be read or is too short, and as
    `engine.quantizing.new_folder`. Raises ModelFormatError for a broken source, or when Tandem can't read the result.
    """
    if form not in CALIBRATED:
        raise ConfigError(f"--format: {form!r} is unknown; allowed: {', '.join((*FORMS, *CALIBRATED))}")
    with new_folder(source, out) as (checkpoint, part):
        group = FORMS["int4"](linear_widths(checkpoint)).group or -1
        CALIBRATED[form](source, part, _samples(source, text), group)
        copy_texts(source, part)
        open_checkpoint(part).close()


def _samples(source: Path, text: Path) -> Samples:
    """Pieces of the text as tokens."""
    try:
        with text.open(encoding="utf-8", errors="replace") as file:
            words = file.read(MOST_CHARACTERS)
    except OSError as error:
        raise ConfigError(f"--text: {text} can't be read: {error.strerror}") from error
    transformers = _tool("transformers", "gptq")
    try:
        ids: list[int] = transformers.AutoTokenizer.from_pretrained(source)(words)["input_ids"]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} has no tokenizer that can be read: {error}") from error
    pieces = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    if not pieces:
        raise ConfigError(
            f"--text: {text} has {len(ids)} tokens; at least {LENGTH} are needed, {SAMPLES} times as many good"
        )
    return pieces[:SAMPLES]


def _gptq(source: Path, out: Path, samples: Samples, group: int) -> None:
    _gptqmodel(source, out, samples, bits=4, group_size=group)


def _awq(source: Path, out: Path, samples: Samples, group: int) -> None:
    _gptqmodel(source, out, samples, bits=4, group_size=group, method="awq", format="gemm", sym=False)


def _gptqmodel(source: Path, out: Path, samples: Samples, **settings: Any) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one, which a small machine gets, it doesn't start
    tool = _tool("gptqmodel", "gptq")
    model = tool.GPTQModel.load(str(source), tool.QuantizeConfig(device=_device(), **settings))
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples], batch_size=1)
    model.save(str(out))


def _auto_round(source: Path, out: Path, samples: Samples, group: int) -> None:
    tool, transformers = _tool("auto_round", "auto-round"), _tool("transformers", "auto-round")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    texts = {"dataset": [torch.tensor([ids]) for ids in samples], "nsamples": len(samples), "seqlen": LENGTH}
    how = {"bits": 4, "group_size": group, "sym": True, "batch_size": min(8, len(samples)), "device_map": _device()}
    how["enable_torch_compile"] = torch.cuda.is_available()  # compiling for a CPU takes minutes
    tool.AutoRound(model, tokenizer, **how, **texts).quantize_and_save(output_dir=str(out), format="auto_round")
    written = next(iter(out.rglob("config.json")), out / "config.json").parent
    if written != out:  # a folder of the tool's own naming
        for path in written.iterdir():
            path.rename(out / path.name)
        shutil.rmtree(out / written.relative_to(out).parts[0])


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _tool(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{module} is needed for this format and can't be imported ({error}); install the extra {extra!r}, best in "
            f"an environment of its own: pip install 'tandem-serve[{extra}]'"
        ) from error


CALIBRATED: Final[Mapping[str, Callable[[Path, Path, Samples, int], None]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
}
"""Name -> what writes a folder from a source, samples and a group size (-1: all inputs)."""
