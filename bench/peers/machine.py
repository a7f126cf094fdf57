"""What a table says about where and when it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

VECTOR_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "sve")


def describe_machine() -> str:
    """CPU model, cores that may be used, vector extensions, memory, kernel."""
    fields = _cpu_fields()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    vectors = " ".join(flag for flag in VECTOR_FLAGS if flag in flags) or "no vector extensions known"
    model = fields.get("model name") or platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {vectors}, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def source_version() -> str:
    """The commit that is checked out, marked when files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--tags"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def load_average() -> float:
    """Runnable processes over the last minute: how quiet the machine is."""
    return os.getloadavg()[0]


def _cpu_fields() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
