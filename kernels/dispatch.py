"""Which implementation runs the operations: decided once a process.

Life cycle: the first `select()` reads TANDEM_KERNELS, compiles or finds the C++ libraries and fixes the answer; every
operation asks `select()` on each call, which costs a dictionary lookup. Tests force a path with `forced("torch")`.

    cpp    C++ through ctypes: row-invariant (the exact promise), fast. The default wherever a compiler is found.
    torch  the reference of each operation. Needs no compiler; many times slower, and its products are not
    row-invariant.

TANDEM_KERNELS=cpp makes a missing compiler an error; TANDEM_KERNELS=torch takes the references.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kernels import build
from tandem.errors import ConfigError

logger = logging.getLogger("kernels")

NAMES = ("cpp", "torch")
SOURCES = (
    "activation.cpp",
    "attention.cpp",
    "blocks.cpp",
    "coded.cpp",
    "embedding.cpp",
    "int8.cpp",
    "linear.cpp",
    "norm.cpp",
    "rope.cpp",
    "sampling.cpp",
    "step.cpp",
)
TILED = ("attention.cpp", "int8.cpp", "step.cpp")
# Part of the numerics id: raise it when a C++ kernel's bits change.
CPP_NUMERICS_VERSION = 2

FALLBACK_WARNING = (
    "no usable C++ compiler: the torch reference kernels are used. Expect several times slower steps, and results "
    "whose bits depend on the batch (the exact promise does not hold). Install g++ or clang++, or set CXX; "
    "`tandem doctor` shows what was found."
)


@dataclass(frozen=True)
class Implementation:
    """One way to run all operations.

    `name` is "cpp" or "torch"; `numerics` names everything that decides result bits (for numerics ids); `row_invariant`
    says whether a row's bits are free of the other rows, of chunking and of the thread count.
    """

    name: str
    numerics: str
    row_invariant: bool


_lock = threading.Lock()
_selected: Implementation | None = None


def select(prefer: str | None = None) -> Implementation:
    """Return the process's implementation, deciding on the first call.

    `prefer` ("cpp", "torch" or None for automatic) and TANDEM_KERNELS count on the deciding call only; the argument
    wins. Raises ConfigError for an unknown name, or when "cpp" is demanded and can't be had.
    """
    return _selected or _decide(prefer)


def _decide(prefer: str | None) -> Implementation:
    with _lock:
        chosen = _selected or _resolve(prefer)
        _set(chosen)
        return chosen


@contextlib.contextmanager
def forced(name: str) -> Iterator[Implementation]:
    """Use implementation `name` inside the block, in all threads: for tests. Raises ConfigError as `select`."""
    with _lock:
        before, chosen = _selected, _resolve(name)
        _set(chosen)
    try:
        yield chosen
    finally:
        with _lock:
            _set(before)


def library(source_name: str) -> ctypes.CDLL | None:
    """Return the compiled `kernels/<source_name>` when the C++ implementation is selected, else None."""
    return build.load_library(source_name) if select().name == "cpp" else None


def _set(implementation: Implementation | None) -> None:
    global _selected
    _selected = implementation


def _resolve(prefer: str | None) -> Implementation:
    wanted = prefer if prefer is not None else (os.environ.get("TANDEM_KERNELS") or None)
    if wanted is not None and wanted not in NAMES:
        source = "TANDEM_KERNELS" if prefer is None else "kernels"
        raise ConfigError(f"{source}={wanted!r} is unknown; allowed: {', '.join(NAMES)}")
    if wanted == "torch":
        return _torch()
    if _load_all():
        return Implementation("cpp", f"cpp{CPP_NUMERICS_VERSION}-{vector_isa()}", row_invariant=True)
    if wanted == "cpp":
        raise ConfigError("the C++ kernels were demanded (TANDEM_KERNELS=cpp), but could not be compiled or loaded")
    logger.warning(FALLBACK_WARNING)
    return _torch()


def _torch() -> Implementation:
    import torch  # late: `import kernels.dispatch` stays light for `tandem doctor`

    return Implementation("torch", f"torch-{torch.__version__}", row_invariant=False)


def _load_all() -> bool:
    """Compile and load every library, several at once; False when one is missing (a mix would have two numerics)."""
    if build.find_compiler() is None:
        return False
    workers = min(len(SOURCES), os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        return all(loaded is not None for loaded in pool.map(build.load_library, SOURCES))


def _built_for() -> tuple[str, ...]:
    """What the compiler made of this CPU: an old one leaves out instructions that /proc/cpuinfo has."""
    lib = build.load_library("int8.cpp")
    if lib is None:
        return ("generic",)
    lib.tandem_built_for.argtypes, lib.tandem_built_for.restype = [], ctypes.c_char_p
    return tuple(lib.tandem_built_for().decode().split())


def vector_isa() -> str:
    """Return the vector instruction set that the C++ kernels are built for: it decides their reduction trees."""
    return _built_for()[0]


def int8_isa() -> str:
    """Return what decides the bits of compute int8 beside `Implementation.numerics`: VNNI, bf16 dot products, tiles."""
    return "-".join([*_built_for()[1:], *(["amx"] if has_tiles() else [])]) or "plain"


def has_tiles() -> bool:
    """True where compute int8 multiplies by AMX tiles: the CPU has them, and TANDEM_TILES=off doesn't forbid it.

    Weights packed for tiles are for tiles only.
    """
    lib = build.load_library("int8.cpp")
    return lib is not None and bool(lib.tandem_tiles())


@contextlib.contextmanager
def tiles(wanted: bool) -> Iterator[None]:
    """Pack and multiply with AMX tiles, where the CPU has them, or without: for tests."""
    libraries = [build.load_library(name) for name in TILED]
    before = has_tiles()
    for lib in libraries:
        if lib is not None:
            lib.tandem_want_tiles(int(wanted))
    try:
        yield
    finally:
        for lib in libraries:
            if lib is not None:
                lib.tandem_want_tiles(int(before))


def has_fast_int8() -> bool:
    """True where int8 products are the fastest; elsewhere they are plain loops."""
    return select().name == "cpp" and "avx512_vnni" in _built_for()


def describe() -> dict[str, object]:
    """Return what `tandem doctor` prints: implementation, numerics, compiler, CPU features that matter, cache folder.

    Compiles what is missing. Raises ConfigError as `select`.
    """
    chosen = select()
    compiler = build.find_compiler()
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
    features = set(build.cpu_features())
    return {
        "implementation": chosen.name,
        "numerics": chosen.numerics,
        "row_invariant": chosen.row_invariant,
        "vector_isa": vector_isa(),
        "fast_int8": has_fast_int8(),
        "amx_tiles": has_tiles(),
        "compiler": None if compiler is None else {"command": " ".join(compiler.command), "version": compiler.version},
        "cpu_features": [name for name in wanted if name in features],
        "cache_dir": str(build.cache_dir()),
    }
