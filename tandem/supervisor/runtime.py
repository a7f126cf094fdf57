"""The private folder of running `tandem up`s: workers files and control sockets.

    $XDG_RUNTIME_DIR/tandem, or tandem-UID in the system's folder for temporary files (0700)
    ├── up-PID/lock           held by flock while that `tandem up` lives
    ├── up-PID/workers.json   what its gateways read
    └── gateway-PORT.sock     its control socket, by its first gateway's port

A `tandem up` removes its files at the end. After a kill -9 the lock is free, and the next one sweeps the remains.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tandem.errors import ConfigError

LONGEST_FOLDER = 107 - len("/gateway-65535.sock")
"""Bytes: the name of a Unix socket has at most 107."""


def runtime_folder() -> Path:
    """The folder, made if need be. Raises ConfigError when somebody else owns it or could write it, or when its name is
    too long for a socket in it.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "tandem" if base else Path(tempfile.gettempdir()) / f"tandem-{os.getuid()}"
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise ConfigError(f"{folder}: the name is too long for a socket; set XDG_RUNTIME_DIR to a shorter folder")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
    except OSError as exc:
        raise ConfigError(f"can't make the runtime folder {folder}: {exc.strerror}") from exc
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(f"{folder} must be a folder of yours that only you can read (chmod 700), or be removed")
    return folder


def control_socket(port: int) -> Path:
    """Where the `tandem up` whose first gateway listens on `port` is controlled."""
    return runtime_folder() / f"gateway-{port}.sock"


class Instance:
    """The files of this `tandem up`. Open for the life of the process; `close` removes them."""

    def __init__(self) -> None:
        """Sweeps what dead ones left, then makes and locks this one's folder. Raises ConfigError."""
        root = runtime_folder()
        sweep(root)
        self.folder = root / f"up-{os.getpid()}"
        try:
            self.folder.mkdir(mode=0o700)
            self._lock: IO[str] = (self.folder / "lock").open("w")
        except OSError as exc:
            raise ConfigError(f"can't write in {root}: {exc.strerror}; set XDG_RUNTIME_DIR to another folder") from exc
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.workers_file = self.folder / "workers.json"

    def write_workers(self, workers: Mapping[str, Sequence[str]]) -> None:
        """Replaces the workers file in one step, so that a reader sees the old or the new one."""
        fresh = self.workers_file.with_suffix(".new")
        fresh.write_text(json.dumps(workers))
        fresh.replace(self.workers_file)

    def close(self) -> None:
        """Removes the folder."""
        self._lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def sweep(root: Path) -> None:
    """Removes what `tandem up`s that are dead left behind."""
    for folder in root.glob("up-*"):
        if _is_dead(folder):
            shutil.rmtree(folder, ignore_errors=True)
    for path in root.glob("gateway-*.sock"):
        if not answers(path):
            path.unlink(missing_ok=True)


def _is_dead(folder: Path) -> bool:
    try:
        with (folder / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError:
        # No lock yet: a sibling may be between making its folder and its lock.
        pid = folder.name.removeprefix("up-")
        return not (pid.isdigit() and Path(f"/proc/{pid}").exists())


def answers(path: Path) -> bool:
    """Whether a living `tandem up` listens on this control socket."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.settimeout(1.0)
        probe.connect(str(path))
        return True
    return False
