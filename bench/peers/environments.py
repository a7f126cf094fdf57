"""Makes each peer's environment, once, with progress that a person can see.

`.peers/NAME/` is a virtual environment and `.peers/NAME.log` what pip said; TANDEM_PEERS_DIR names another place.
An environment is made anew when what it should hold changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.peers.peer import Peer
from bench.peers.processes import stop_group

INSTALL_SECONDS = 3600
PROGRESS_SECONDS = 15
STAMP = ".tandem-peer"


class PeerError(Exception):
    """A peer can't be set up or run; the message says why, in one line."""


def peers_dir() -> Path:
    """Where environments and converted weights lie."""
    return Path(os.environ.get("TANDEM_PEERS_DIR") or ".peers").expanduser().resolve()


def peer_python(peer: Peer) -> Path:
    """The interpreter of a peer's environment."""
    return peers_dir() / peer.name / "bin" / "python"


def ensure_environment(peer: Peer) -> None:
    """Installs `peer` unless it is there. Raises PeerError."""
    folder = peers_dir() / peer.name
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text() == _contents(peer):
        return
    log = folder.with_name(f"{peer.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    print(f"==> {peer.name}: making its environment with {peer.requirement} (log: {log})", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    torch_index = os.environ.get("TORCH_INDEX_URL")
    extra = ["--extra-index-url", torch_index] if torch_index else []
    run_logged([sys.executable, "-m", "venv", str(folder)], log, peer.name)
    verbose = ["--verbose"] if peer.build_environment else []  # a compilation's progress is its compiler's
    run_logged([*pip, "install", *verbose, *extra, peer.requirement], log, peer.name, peer.build_environment)
    if peer.unwanted:
        run_logged([*pip, "uninstall", "-y", *peer.unwanted], log, peer.name)
    stamp.write_text(_contents(peer))


def ensure_hf_folder(gguf: Path) -> Path:
    """The Hugging Face folder made from `gguf`, for peers that need one. Raises PeerError."""
    folder = peers_dir() / f"{gguf.stem}-bf16"
    if not folder.is_dir():
        print(f"==> making a Hugging Face folder of bfloat16 from {gguf.name}", flush=True)
        log = folder.with_name("hf_folder.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        run_logged([sys.executable, "-m", "bench.peers.hf_folder", str(gguf), str(folder)], log, "hf_folder")
    return folder


def installed_version(python: Path, distribution: str) -> str:
    """The version of a distribution in another environment, or "unknown"."""
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def run_logged(
    command: Sequence[str],
    log: Path,
    title: str,
    environment: Mapping[str, str] | None = None,
    limit_seconds: float = INSTALL_SECONDS,
) -> None:
    """Runs `command` with its output in `log`; says every 15 seconds how far it is. Raises PeerError when it fails."""
    start = time.monotonic()
    with log.open("a") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            while True:
                try:
                    code = process.wait(PROGRESS_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    elapsed = time.monotonic() - start
                    print(f"    {title}: {elapsed:.0f} s, {last_line(log)[:100]}", flush=True)
                    if elapsed > limit_seconds:
                        raise PeerError(f"set-up took more than {limit_seconds:.0f} s (see {log.name})") from None
        finally:
            stop_group(process)
    if code:
        raise PeerError(f"set-up failed: {last_line(log)} (see {log.name})")


def last_line(log: Path) -> str:
    """The last line that says something."""
    text = log.read_bytes()[-4000:].decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _contents(peer: Peer) -> str:
    return "\n".join([peer.requirement, *(f"-{name}" for name in peer.unwanted), sys.version.split()[0]]) + "\n"
