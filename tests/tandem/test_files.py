"""Files that are read again when they change, and who may write or read secret ones."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from tandem.errors import ConfigError
from tandem.service.files import RETRY_SECONDS, Reloaded, check_private, tell_if_readable


def test_secret_files_are_not_for_others_to_write(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    check_private(path, "--flag")
    for mode in (0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="--flag: others can write"):
            check_private(path, "--flag")


def test_secret_files_that_all_can_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Mock()
    monkeypatch.setattr("tandem.service.files._log", log)
    path = tmp_path / "key"
    for mode, warnings in ((0o640, 0), (0o644, 1)):
        path.touch()
        path.chmod(mode)
        tell_if_readable(path, "--flag")
        assert log.warning.call_count == warnings


def test_reloaded_reads_only_what_changed_and_keeps_the_last_good_value(tmp_path: Path) -> None:
    path, reads = tmp_path / "value", []

    def read() -> str:
        reads.append(path.read_text())
        if reads[-1] == "bad":
            raise ConfigError("bad")
        return reads[-1]

    path.write_text("one")
    value = Reloaded([path], read, "a value")
    assert (value.get(), value.get(), len(reads)) == ("one", "one", 1)
    for text, expected in (("bad", "one"), ("three", "three")):
        path.write_text(text)
        os.utime(path, ns=(1, len(reads)))  # also where the file system's clock is coarse
        assert (value.get(), value.get()) == (expected, expected)
    assert (reads, value.current()) == (["one", "bad", "three"], ("three", 2))


def test_what_failed_is_tried_again_though_the_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes: a certificate becomes valid, a disk answers again. One try in a while, one line for each complaint."""
    log = Mock()
    monkeypatch.setattr("tandem.service.files._log", log)
    path, now, wrong, reads = tmp_path / "value", [0.0], [""], []

    def read() -> str:
        reads.append(now[0])
        if wrong[0]:
            raise ConfigError(wrong[0])
        return path.read_text()

    path.write_text("one")
    value = Reloaded([path], read, "a value", clock=lambda: now[0])
    path.write_text("fresh")
    for moment, complaint in ((10.0, "early"), (20.0, "early"), (30.0, "broken")):
        now[0], wrong[0] = moment, complaint
        assert [value.current() for _ in range(3)] == [("one", 1)] * 3
    wrong[0] = ""
    assert value.get() == "one", "not yet"
    now[0] += RETRY_SECONDS
    assert value.current() == ("fresh", 2)
    now[0] += 100
    assert value.current() == ("fresh", 2)
    assert reads == [0.0, 10.0, 20.0, 30.0, 30.0 + RETRY_SECONDS]
    assert [call.kwargs["error"] for call in log.error.call_args_list] == ["early", "broken"]


def test_a_mended_mode_counts_as_a_change(tmp_path: Path) -> None:
    """At once, without waiting for another try; the same value is no new version."""
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text("one")

    def read() -> str:
        check_private(path, "--flag")
        return path.read_text()

    value = Reloaded([path], read, "a key", clock=lambda: 0.0)
    path.write_text("fresh")
    path.chmod(0o620)
    assert value.get() == "one"
    changed = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == changed:  # the file system's clock is coarse
        path.chmod(0o600)
    assert value.current() == ("fresh", 2)
    path.chmod(0o400)
    assert value.current() == ("fresh", 2)
