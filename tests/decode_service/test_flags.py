"""The command line of a decode worker."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from decode_service.__main__ import main
from decode_service.flags import parse_flags
from kv_transfer import nixl_agent, registry
from tandem.errors import ConfigError


def test_defaults_and_values() -> None:
    flags = parse_flags(["--model", "m.gguf", "--chunk-size", "7", "--no-prefix-cache", "--drain-grace", "2.5"])
    assert flags.engine["max_step_tokens"] == 7
    assert flags.engine["prefix_cache"] is False
    assert flags.engine["share_weights"] is True
    assert parse_flags(["--model", "m", "--no-share-weights"]).engine["share_weights"] is False
    assert flags.engine["attention"] == "auto"
    assert parse_flags(["--model", "m", "--attention", "flashinfer"]).engine["attention"] == "flashinfer"
    assert flags.convert_kv_dtype is False
    assert parse_flags(["--model", "m", "--convert-kv-dtype"]).convert_kv_dtype is True
    assert flags.listen == "127.0.0.1:0"
    assert flags.drain_grace == 2.5
    assert "grpc" in flags.transports


def test_a_transport_leaves_the_better_ones_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "installed", lambda: True)
    monkeypatch.setattr(registry, "_check_nixl", Mock())
    for transports in (("shm", "grpc"), ("nixl", "grpc"), ("grpc",)):
        assert parse_flags(["--model", "m", "--transport", transports[0]]).transports == transports


def test_nixl_without_its_wheel_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "PACKAGES", ("no_such_nixl",))
    with pytest.raises(ConfigError, match=r"--transport: .*pip install --no-deps nixl-cu12"):
        parse_flags(["--model", "m", "--transport", "nixl"])
    assert "nixl" not in parse_flags(["--model", "m"]).transports


def test_kv_goes_in_clear_and_unchecked_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.flags.available", lambda: ["shm", "nixl", "grpc"])
    monkeypatch.setattr("worker.flags.require", lambda name: None)
    tls = ["--tls-cert", "c", "--tls-key", "k", "--tls-ca", "a"]
    expected = {
        (): ("shm", "grpc"),
        ("--transport", "shm"): ("shm", "grpc"),
        ("--transport", "nixl"): ("nixl", "grpc"),
        ("--transport", "grpc"): ("grpc",),
    }
    for flags, transports in expected.items():
        assert parse_flags(["--model", "m", *flags]).transports == transports
        assert parse_flags(["--model", "m", *tls, *flags]).transports == transports


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], "--model"),
        (["--model", "m", "--listen", "nowhere"], "--listen"),
        (["--model", "m", "--metrics", "1:2:3"], "--metrics"),
        (["--model", "m", "--transport", "pigeon"], "--transport"),
        (["--model", "m", "--drain-grace", "-1"], "--drain-grace"),
        (["--model", "m", "--drain-grace", "nan"], "--drain-grace"),
        (["--model", "m", "--drain-grace", "inf"], "--drain-grace"),
        (["--model", "m", "--log-level", "loud"], "--log-level"),
        (["--model", "m", "--threads", "two"], "--threads"),
        (["--model", "m", "--colour", "red"], "--colour"),
        (["--model", "m", "--tls-cert", "c", "--tls-key", "k"], "--tls-ca"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(
    argv: list[str], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=names):
        parse_flags(argv)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_model_that_is_not_there_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tmp_path / "none.gguf")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line[:7] for line in captured.err.splitlines()] == ["error: "]
