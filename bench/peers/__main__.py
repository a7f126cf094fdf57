"""Tandem beside its peers: same weights, same work, one run.

    make bench-peers                                              # all peers, all points, 3 rounds
    make bench-peers PEERS=openvino,llamacpp ROUNDS=1 POINTS=pp512,tg8

Sets the peers up, then measures in rounds: in each, every system takes its turn with one process for all points, so
that drift of the machine hits all alike. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tandem
from bench.peers import llamacpp, openvino, vllm
from bench.peers.environments import PeerError, ensure_environment, ensure_hf_folder, installed_version, peer_python
from bench.peers.machine import describe_machine, load_average, source_version
from bench.peers.peer import Peer
from bench.peers.processes import measure_points
from bench.peers.table import TANDEM, Comparison, System, markdown, write
from bench.points import parse_points
from tandem.errors import ConfigError, TandemError
from tandem.models import resolve_model

PEERS = {peer.name: peer for peer in (openvino.PEER, vllm.PEER, llamacpp.PEER)}
POINTS = "pp512,pp8x512,tg1,tg4,tg8,tg16,tg32,pp4000,tg8@4000"

Command = Callable[[Sequence[str]], Sequence[str]]


def choose_peers(text: str) -> list[Peer]:
    """A comma-separated list of names. Raises ConfigError for one that is unknown."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"PEERS: {name!r} is not one of {', '.join(PEERS)}")
    return [PEERS[name] for name in names]


def set_up(peer: Peer, gguf: Path, runs: int) -> tuple[System, Command | None]:
    """A peer's row, and what measures it unless it can't be set up."""
    system = System(peer.name, peer.title, peer.requirement.partition("==")[2])
    try:
        ensure_environment(peer)
        model = ensure_hf_folder(gguf) if peer.weights == "hf" else gguf
    except PeerError as error:
        system.why[""] = str(error)
        print(f"    {peer.name}: {error}", flush=True)
        return system, None
    python = peer_python(peer)
    system.version = installed_version(python, peer.distribution)
    driver = [str(python), "-m", f"bench.peers.{peer.name}", "--model", str(model), "--runs", str(runs)]
    return system, lambda points: [*driver, "--points", ",".join(points)]


def tandem_command(gguf: Path, runs: int, flags: Sequence[str]) -> Command:
    """What measures Tandem."""
    driver = [sys.executable, "-m", "bench.offline", "--model", str(gguf), "--runs", str(runs), "--json", *flags]
    return lambda points: [*driver, "--points", ",".join(points)]


def run_rounds(turns: Sequence[tuple[System, Command | None]], points: Sequence[str], rounds: int) -> None:
    """Measures every system once per round, all its points in one process."""
    for number in range(1, rounds + 1):
        for system, command in turns:
            if command is None:
                continue
            print(f"==> round {number} of {rounds}: {system.name} (load {load_average():.1f})", flush=True)
            for measurement in measure_points(command, points):
                system.add(measurement)
                rate = measurement.tokens_per_s
                print(f"    {measurement.point}: {measurement.why if rate is None else f'{rate:.1f}'}", flush=True)


def main() -> int:
    """Command line; the exit code says whether Tandem was measured at every point."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--peers", default=os.environ.get("PEERS") or ",".join(PEERS), help="default: all (PEERS)")
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("ROUNDS") or 3), help="default: 3 (ROUNDS)")
    parser.add_argument("--points", default=os.environ.get("POINTS") or POINTS, help=f"default: {POINTS} (POINTS)")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of a point per process")
    parser.add_argument("--model", default="default", help="default, or a path to a GGUF file of the same vocabulary")
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="folder for the table")
    parser.add_argument("--no-tandem", action="store_true", help="peers only")
    parser.add_argument("tandem_flags", nargs="*", help="flags for bench.offline, after --")
    arguments = parser.parse_args()
    points = [point.name for point in parse_points(arguments.points)]
    gguf = resolve_model(arguments.model)
    started = datetime.datetime.now(datetime.UTC)
    load = load_average()

    turns: list[tuple[System, Command | None]] = []
    if not arguments.no_tandem:
        row = System(TANDEM, "Tandem", f"{tandem.__version__} {source_version()}".strip())
        turns.append((row, tandem_command(gguf, arguments.runs, arguments.tandem_flags)))
    turns += [set_up(peer, gguf, arguments.runs) for peer in choose_peers(arguments.peers)]
    run_rounds(turns, points, arguments.rounds)

    facts = {
        "machine": describe_machine(),
        "date": f"{started:%Y-%m-%d %H:%M} UTC",
        "load": f"{load:.1f} before, {load_average():.1f} at the end (one-minute averages)",
        "model": gguf.name,
        "rounds": f"{arguments.rounds}, each with one process per system and {arguments.runs} counted runs per point",
        "command": f"make bench-peers PEERS={arguments.peers} ROUNDS={arguments.rounds} POINTS={','.join(points)}"
        + (f" ARGS={shlex.quote(shlex.join(sys.argv[1:]))}" if sys.argv[1:] else ""),
    }
    comparison = Comparison(facts, points, [system for system, _ in turns])
    paths = write(comparison, arguments.results / f"peers-{started:%Y-%m-%d-%H%M%S}")
    print(markdown(comparison))
    print("written:", *paths, flush=True)
    failed = [system for system, _ in turns if system.name == TANDEM and len(system.rates) < len(set(points))]
    return 1 if failed else 0


if __name__ == "__main__":
    # An exit by exception ends the processes of the system that is being measured, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except TandemError as error:
        sys.exit(f"error: {error}")
