"""What the CLI, which imports no torch, runs as a process: `describe MODEL` and `quantize FORMAT MODEL OUT [TEXT]`.

`describe` prints one JSON object; `quantize` prints a line a tensor to stderr, with TEXT what the format's tool prints.
Errors: one line, exit code 2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engine.calibrating import calibrate_folder
from engine.describing import describe
from engine.quantizing import quantize_folder
from tandem.errors import ConfigError


def main(words: list[str]) -> None:
    """`words` as in the module's text."""
    if words[0] == "describe":
        sys.stdout.write(json.dumps(describe(Path(words[1]))) + "\n")
        return
    _, form, source, out, *text = words
    if text:
        calibrate_folder(Path(source), Path(out), form, Path(text[0]))
        return
    quantize_folder(Path(source), Path(out), form, _show)


def _show(done: int, total: int) -> None:
    end = "\n" if done == total else "\r"
    sys.stderr.write(f"{done} of {total} tensors{end}")
    sys.stderr.flush()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
