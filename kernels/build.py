"""Compile the C++ kernels on first use and load them through ctypes.

Life cycle of one library: found in the cache -> loaded; or compiled under a file lock to a temporary name, renamed into
place (so that no process ever sees half a file), loaded. Libraries stay loaded for the life of the process. The cache
key covers the source, all headers of this folder, the flags, the compiler and the CPU's features: another machine on
the same home directory gets its own files.

The sources are plain C++17 with `extern "C"` functions, no torch headers. They must be loaded after `import torch`, so
that their OpenMP is torch's own libgomp and there is one thread pool; `load_library` sees to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("kernels")

SOURCE_DIR = Path(__file__).resolve().parent
COMPILE_TIMEOUT_S = 300.0
# -ffp-contract=off: a multiply and an add are fused only where the source says so (`fma`), never by the compiler's
# choice, which may differ between two instances of one template and would break the exact promise.
_COMMON_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")

_load_lock = threading.Lock()
_source_locks: dict[str, threading.Lock] = {}


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that was found: the command (several words when $CXX has arguments) and its first version line."""

    command: tuple[str, ...]
    version: str


@functools.cache
def find_compiler() -> Compiler | None:
    """Return the first of $CXX, g++, clang++ and c++ that answers `--version`; None when there is none."""
    candidates = [os.environ.get("CXX", "").split(), ["g++"], ["clang++"], ["c++"]]
    for command in candidates:
        if not command or shutil.which(command[0]) is None:
            continue
        try:
            answer = subprocess.run(  # noqa: S603 - the command is a compiler named by the user or by us
                [*command, "--version"], capture_output=True, text=True, timeout=30, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return Compiler(tuple(command), answer.stdout.partition("\n")[0].strip())
    return None


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """Return the CPU's feature names, sorted, from /proc/cpuinfo (x86 `flags`, ARM `Features`); empty where unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return tuple(sorted(value.split()))
    return ()


def cache_dir() -> Path:
    """Return the folder of compiled libraries: $TANDEM_CACHE_DIR/kernels, or ~/.cache/tandem/kernels."""
    root = os.environ.get("TANDEM_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "tandem") / "kernels"


def _scratch_dir() -> Path:
    """Return a private folder for compiled libraries among the temporary files, where the cache can't be written (in a
    container with a read-only root, for one). Raises OSError when somebody else could put a library there.
    """
    root = Path(tempfile.gettempdir()) / f"tandem-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    facts = root.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise PermissionError(f"{root} is not a folder that only this user can enter")
    return root / "kernels"


def _flag_sets() -> list[tuple[str, ...]]:
    """Return the flag sets to try, best first: some compilers have no OpenMP, some no native tuning."""
    native = "-march=native" if platform.machine() in {"x86_64", "AMD64", "i686"} else "-mcpu=native"
    return [(*_COMMON_FLAGS, native, "-fopenmp"), (*_COMMON_FLAGS, native), _COMMON_FLAGS]


def _cache_key(source: Path, compiler: Compiler) -> str:
    digest = hashlib.sha256()
    for path in [source, *sorted(SOURCE_DIR.glob("*.h"))]:
        content = path.read_bytes()
        digest.update(f"{path.name}:{len(content)}:".encode())
        digest.update(content)
    facts = (compiler.command, compiler.version, _flag_sets(), platform.machine(), cpu_features())
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:24]


def library_key(name: str) -> str:
    """All that decides what the library of source `name` computes; empty without a compiler."""
    compiler = find_compiler()
    return "" if compiler is None else _cache_key(SOURCE_DIR / name, compiler)


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel drops it when the holder dies."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _run_compiler(source: Path, target: Path, compiler: Compiler) -> str | None:
    """Compile `source` to `target` with the first flag set that works; return the last error text, None on success."""
    error = "no flags tried"
    for flags in _flag_sets():
        command = [*compiler.command, *flags, str(source), "-o", str(target)]
        try:
            done = subprocess.run(  # noqa: S603 - a compiler on our own source
                command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.SubprocessError) as exc:
            return str(exc)
        if done.returncode == 0:
            return None
        error = done.stderr[-4000:]
    return error


def compile_library(source_name: str) -> Path | None:
    """Return the compiled form of `kernels/<source_name>`, compiling it when the cache has none; None when that fails.

    Writes progress lines to stderr when it compiles. Any number of processes may call it at once.
    Raises FileNotFoundError when the source does not exist.
    """
    source = SOURCE_DIR / source_name
    compiler = find_compiler()
    if compiler is None:
        return None
    name = f"{source.stem}-{_cache_key(source, compiler)}.so"
    for folder in (cache_dir, _scratch_dir):
        try:
            return _find_or_compile(source, folder() / name, compiler)
        except OSError as exc:
            _warn_once(f"the kernel cache can't be written: {exc}")
    return None


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _find_or_compile(source: Path, target: Path, compiler: Compiler) -> Path | None:
    """Return `target`, compiled if need be; None when the compiler fails. Raises OSError where it can't write, on a
    full disk too.
    """
    if target.exists():
        return target
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _file_lock(target.with_suffix(".lock")):
        return target if target.exists() else _compile_into_place(source, target, compiler)


def _compile_into_place(source: Path, target: Path, compiler: Compiler) -> Path | None:
    started = time.monotonic()
    sys.stderr.write(f"kernels: compiling {source.name}, once on this machine\n")
    handle, temporary_name = tempfile.mkstemp(prefix=f".{source.stem}-", suffix=".so", dir=target.parent)
    os.close(handle)
    temporary = Path(temporary_name)
    try:
        error = _run_compiler(source, temporary, compiler)
        if error is not None and os.strerror(errno.ENOSPC) in error:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target.parent))
        if error is not None:
            logger.warning("compiling %s with %s failed: %s", source.name, " ".join(compiler.command), error)
            return None
        temporary.chmod(0o755)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sys.stderr.write(f"kernels: compiled {source.name} in {time.monotonic() - started:.1f} s\n")
    return target


def _ensure_torch_first() -> None:
    """Import torch before any of our libraries: its libgomp must be the one that the loader finds for ours."""
    import torch  # noqa: F401 - late: `import kernels.build` stays light


def load_library(source_name: str) -> ctypes.CDLL | None:
    """Compile (or find) and load `kernels/<source_name>`, for example "sampling.cpp"; None when it can't be had.

    Answers are remembered for the life of the process. ctypes releases the GIL during each call. Thread-safe; two
    different sources compile side by side. Raises FileNotFoundError when the source does not exist.
    """
    with _load_lock:
        lock = _source_locks.setdefault(source_name, threading.Lock())
    with lock:
        return _load_once(source_name)


@functools.cache
def _load_once(source_name: str) -> ctypes.CDLL | None:
    _ensure_torch_first()
    path = compile_library(source_name)
    if path is None:
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as exc:
        logger.warning("the compiled kernel %s can't be loaded: %s", path, exc)
        return None
