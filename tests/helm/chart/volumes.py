"""Volumes of Secrets as the kubelet makes them: files are links through one that changes with all of them at once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

DATA = "..data"


def put(folder: Path, contents: Mapping[str, bytes], mode: int, group: int | None = None) -> None:
    """Fills the folder, or replaces what it holds in one step; the files' keys stay the same. `group`: the pod's."""
    fresh = Path(tempfile.mkdtemp(prefix="..", dir=folder))
    fresh.chmod(0o755)
    for key, data in contents.items():
        (fresh / key).write_bytes(data)
        (fresh / key).chmod(mode)
        if group is not None:
            shutil.chown(fresh / key, group=group)
        if not (folder / key).is_symlink():
            (folder / key).symlink_to(f"{DATA}/{key}")
    link, old = folder / DATA, (folder / DATA).resolve()
    renamed = folder / f"{DATA}_tmp"
    renamed.symlink_to(fresh.name)
    renamed.rename(link)
    if old.name != DATA:
        shutil.rmtree(old)
