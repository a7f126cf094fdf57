"""Compiling and choosing: the cache, its lock, failures that fall back, and one OpenMP runtime in the process."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import build, dispatch
from tandem.errors import ConfigError

SOURCE = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources with its own cache."""
    (tmp_path / "answer.cpp").write_text(SOURCE)
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path)
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def test_compiles_once_and_says_so(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = build.compile_library("answer.cpp")
    assert first is not None
    assert first.parent == room / "cache" / "kernels"
    assert ctypes.CDLL(str(first)).answer() == 42
    assert (
        "kernels: compiling answer.cpp, once on this machine\nkernels: compiled answer.cpp" in capsys.readouterr().err
    )
    assert build.compile_library("answer.cpp") == first
    assert capsys.readouterr().err == ""
    assert [path.name for path in first.parent.glob("*.so")] == [first.name]


def test_a_changed_header_is_another_library(room: Path) -> None:
    first = build.compile_library("answer.cpp")
    (room / "answer.h").write_text("#define ANSWER 43\n")
    second = build.compile_library("answer.cpp")
    assert first is not None
    assert second is not None
    assert first != second
    assert ctypes.CDLL(str(second)).answer() == 43


def test_a_source_that_does_not_compile_is_none_with_the_reason(room: Path, caplog: pytest.LogCaptureFixture) -> None:
    (room / "answer.cpp").write_text("this is not C++")
    with caplog.at_level(logging.WARNING, "kernels"):
        assert build.compile_library("answer.cpp") is None
    assert "compiling answer.cpp" in caplog.text
    assert not list((room / "cache" / "kernels").glob("*.so"))


def test_a_cache_that_can_not_be_written_has_a_stand_in(
    room: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (room / "file").write_text("")
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(room / "file"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(room))
    with caplog.at_level(logging.WARNING, "kernels"):
        library = build.compile_library("answer.cpp")
    assert library is not None
    assert ctypes.CDLL(str(library)).answer() == 42
    assert library.is_relative_to(room / f"tandem-{os.getuid()}")
    assert caplog.text.count("can't be written") == 1


def test_a_full_cache_has_a_stand_in_too(
    room: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The compiler is who finds out; nothing half-written stays."""
    monkeypatch.setattr(build.tempfile, "tempdir", str(room))
    compile_ = build._run_compiler

    def full(source: Path, target: Path, compiler: build.Compiler) -> str | None:
        if target.is_relative_to(room / "cache"):
            return "ld: final link failed: No space left on device"
        return compile_(source, target, compiler)

    monkeypatch.setattr(build, "_run_compiler", full)
    with caplog.at_level(logging.WARNING, "kernels"):
        library = build.compile_library("answer.cpp")
    assert library is not None
    assert ctypes.CDLL(str(library)).answer() == 42
    assert library.is_relative_to(room / f"tandem-{os.getuid()}")
    assert not list((room / "cache" / "kernels").glob("*.so"))


def test_a_stand_in_that_others_can_enter_is_not_used(
    room: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (room / "file").write_text("")
    monkeypatch.setenv("TANDEM_CACHE_DIR", str(room / "file"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(room))
    (room / f"tandem-{os.getuid()}").mkdir(mode=0o755)
    with caplog.at_level(logging.WARNING, "kernels"):
        assert build.compile_library("answer.cpp") is None
    assert "only this user can enter" in caplog.text


def test_a_missing_source_is_an_error(room: Path) -> None:
    with pytest.raises(FileNotFoundError):
        build.compile_library("nothing.cpp")


def test_processes_side_by_side_compile_once(room: Path) -> None:
    code = (
        "import pathlib, sys; from kernels import build; build.SOURCE_DIR = pathlib.Path(sys.argv[1]);"
        "print(build.compile_library('answer.cpp'))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(room)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    results = [process.communicate(timeout=120) for process in started]
    assert len({out for out, _ in results}) == 1
    assert results[0][0].strip().endswith(".so")
    assert sum("compiled answer.cpp" in err for _, err in results) == 1


def test_cxx_comes_first(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = room / "my-compiler"
    wrapper.write_text("#!/bin/sh\nif [ \"$1\" = --version ]; then echo 'wrapper 1.0'; fi\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    build.find_compiler.cache_clear()
    try:
        assert build.find_compiler() == build.Compiler((str(wrapper),), "wrapper 1.0")
    finally:
        build.find_compiler.cache_clear()


def test_the_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_selected", None)
    monkeypatch.setenv("TANDEM_KERNELS", "torch")
    assert dispatch.select().name == "torch"
    monkeypatch.setenv("TANDEM_KERNELS", "cpp")
    assert dispatch.select().name == "torch"
    assert dispatch.library("linear.cpp") is None


def test_the_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_selected", None)
    monkeypatch.setenv("TANDEM_KERNELS", "torch")
    chosen = dispatch.select("cpp")
    assert (chosen.name, chosen.row_invariant) == ("cpp", True)
    assert isinstance(dispatch.library("linear.cpp"), ctypes.CDLL)


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_selected", None)
    monkeypatch.setenv("TANDEM_KERNELS", "fortran")
    with pytest.raises(ConfigError, match=r"TANDEM_KERNELS='fortran'.*cpp, torch"):
        dispatch.select()


def test_without_a_compiler_torch_serves_and_the_cost_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "_selected", None)
    monkeypatch.delenv("TANDEM_KERNELS", raising=False)
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    with caplog.at_level(logging.WARNING, "kernels"):
        chosen = dispatch.select()
    assert (chosen.name, chosen.row_invariant) == ("torch", False)
    assert "exact promise does not hold" in caplog.text


def test_cpp_on_demand_without_a_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    with pytest.raises(ConfigError, match="demanded"), dispatch.forced("cpp"):
        pass


def test_describe_tells_what_the_doctor_prints() -> None:
    with dispatch.forced("cpp"):
        facts = dispatch.describe()
    assert facts["implementation"] == "cpp"
    assert facts["vector_isa"] in str(facts["numerics"])
    compiler = build.find_compiler()
    assert compiler is not None
    assert facts["compiler"] == {"command": " ".join(compiler.command), "version": compiler.version}
    assert facts["cache_dir"] == str(build.cache_dir())


def test_importing_dispatch_does_not_import_torch() -> None:
    code = "import sys, kernels, kernels.build, kernels.dispatch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_is_loaded() -> None:
    with dispatch.forced("cpp"):
        torch.ones(1000, 1000).sum()
    maps = Path("/proc/self/maps").read_text()
    runtimes = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libomp" in line}
    assert len(runtimes) == 1


def test_numerics_follow_the_build_and_not_the_cpu(tmp_path: Path) -> None:
    """A compiler that can't make this CPU's instructions gives other bits, so another numerics id."""
    compiler = tmp_path / "old-compiler"
    compiler.write_text(
        '#!/bin/sh\nfor flag; do shift; case $flag in -m*=native) ;; *) set -- "$@" "$flag";; esac; done\n'
    )
    with compiler.open("a") as script:
        script.write('exec g++ "$@"\n')
    compiler.chmod(0o755)
    code = "from kernels import dispatch as d; print(d.select().numerics, d.int8_isa(), d.has_fast_int8())"
    environment = {**os.environ, "CXX": str(compiler), "TANDEM_CACHE_DIR": str(tmp_path), "TANDEM_KERNELS": "cpp"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    numerics, int8, fast = done.stdout.split()
    expected = "aarch64" if platform.machine() == "aarch64" else "generic"
    assert numerics == f"cpp{dispatch.CPP_NUMERICS_VERSION}-{expected}"
    assert (int8, fast) == ("plain", "False")
