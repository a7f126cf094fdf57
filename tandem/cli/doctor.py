"""`tandem doctor`: what is on this machine, and what Tandem will use of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from tandem.errors import TandemError
from tandem.models import resolve_model
from tandem.supervisor.settings import environment

PACKAGES = ("tandem-serve", "torch", "grpcio", "protobuf", "tokenizers", "gguf", "safetensors", "transformers", "numpy")
PROBE_SECONDS = 180
"""The kernels' probe compiles them when this machine has none yet."""


@click.command("doctor")
@click.option("--model", default="default", show_default=True, help="The model to look for.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: str, as_json: bool) -> None:
    """Show what was found on this machine and what will be used. Exit code 1 when Tandem can't serve here."""
    found = examine(model)
    if as_json:
        print(json.dumps(found))
    else:
        _show(found)
    if found["problems"]:
        sys.exit(1)


def examine(model: str) -> dict[str, Any]:
    """Everything that the command prints; `notes` are what the probes remarked, `problems` keep Tandem from serving."""
    problems: list[str] = []
    # Run as processes of their own, because the CLI imports neither torch nor the services' rooms.
    kernels = _probe("kernels", problems)
    transfer = _probe("kv_transfer", problems)
    return {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "cpu": _cpu(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _gpus(),
        "compiler": kernels.get("compiler"),
        "kernels": kernels,
        "transports": transfer.get("transports", []),
        "model": _model(model, problems),
        "packages": {name: _version(name) for name in PACKAGES},
        "use": _use(kernels, transfer),
        "notes": [*kernels.get("notes", []), *transfer.get("notes", [])],
        "problems": problems,
    }


def _probe(module: str, problems: list[str]) -> dict[str, Any]:
    """What `python -m MODULE` prints about itself, as JSON, and its `notes`, shown as they come: it may have to compile
    for a minute.
    """
    with subprocess.Popen(  # noqa: S603  # our own modules
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        watchdog = threading.Timer(PROBE_SECONDS, process.kill)
        watchdog.start()
        notes = list(_shown(process.stderr or ()))
        said = process.stdout.read() if process.stdout else ""
    watchdog.cancel()
    with contextlib.suppress(ValueError):
        if process.returncode == 0:
            return {**json.loads(said), "notes": notes}
    problems.append(f"{module}: {(notes or [f'exit code {process.returncode}'])[-1]}")
    return {}


def _shown(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)
        yield line.rstrip("\n")


def _cpu() -> dict[str, Any]:
    facts: dict[str, str] = {}
    with_colon = (line.split(":", 1) for line in _read("/proc/cpuinfo").splitlines() if ":" in line)
    for key, value in with_colon:
        facts.setdefault(key.strip(), value.strip())
    return {"name": facts.get("model name") or platform.machine(), "cores": len(os.sched_getaffinity(0))}


def _gpus() -> list[str]:
    """Names of NVIDIA GPUs by the driver's own files; empty without one."""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [line.split(":", 1)[1].strip() for card in cards for line in _read(card).splitlines() if "Model:" in line]
    return names or (["present (nvidia-smi found)"] if shutil.which("nvidia-smi") and cards else [])


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _model(name: str, problems: list[str]) -> dict[str, Any]:
    try:
        path = resolve_model(name)
    except TandemError as exc:
        problems.append(f"model: {exc}")
        return {"name": name, "path": None}
    size = sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
    return {"name": name, "path": str(path), "bytes": size}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _use(kernels: dict[str, Any], transfer: dict[str, Any]) -> dict[str, Any]:
    """What `tandem up` without flags takes."""
    if kernels.get("gpu"):
        return {
            "device": f"cuda ({kernels['gpu']})",
            "kernels": kernels.get("gpu_operations"),
            "attention": kernels.get("gpu_attention"),
            "kv_of_8_bits": kernels.get("gpu_attention_8_bit"),
            **_refused(kernels.get("gpu_attention_refused") or {}),
            "compute": "native",
            "exact_promise": "does not hold",
            "transport": (transfer.get("transports") or [None])[0],
        }
    return {
        "device": "cpu",
        "kernels": kernels.get("implementation"),
        "compute": "int8" if kernels.get("fast_int8") else "exact",
        "exact_promise": "holds" if kernels.get("row_invariant") else "does not hold",
        "transport": (transfer.get("transports") or [None])[0],
    }


def _refused(reasons: dict[str, str]) -> dict[str, str]:
    """A line about the kinds of attention that can't be had."""
    return {"attention_not": ", ".join(f"{name}: {reason}" for name, reason in reasons.items())} if reasons else {}


def _show(found: dict[str, Any]) -> None:
    compiler = found["compiler"]
    rows: list[tuple[str, Callable[[], str]]] = [
        ("python", lambda: f"{found['python']['version']}  {found['python']['executable']}"),
        ("cpu", lambda: f"{found['cpu']['name']}, {found['cpu']['cores']} cores"),
        ("  features", lambda: " ".join(found["kernels"].get("cpu_features") or ["none that matter"])),
        ("memory", lambda: f"{found['memory_bytes'] / 2**30:.1f} GiB"),
        ("gpu", lambda: ", ".join(found["gpu"]) or "none"),
        ("compiler", lambda: f"{compiler['command']} ({compiler['version']})" if compiler else "none"),
        ("transports", lambda: ", ".join(found["transports"]) or "none"),
        ("model", lambda: _model_text(found["model"])),
        ("packages", lambda: ", ".join(f"{k} {v or 'missing'}" for k, v in found["packages"].items())),
    ]
    for title, text in rows:
        print(f"{title:12}{text()}")
    print("\nwill use")
    for key, value in found["use"].items():
        print(f"  {key.replace('_', ' '):14}{value or 'nothing'}")
    for problem in found["problems"]:
        print(f"\nproblem: {problem}")


def _model_text(model: dict[str, Any]) -> str:
    return f"{model['path']} ({model['bytes'] / 1e6:.0f} MB)" if model["path"] else f"{model['name']}: not found"
