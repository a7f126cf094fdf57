"""Packages that are used where somebody installed them: whether they are there, and in a version that is known here.

Nothing is imported to find out: some of them take seconds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Package:
    """`least` <= version < `below`; both empty: any version."""

    module: str
    distribution: str
    least: str = ""
    below: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether there is something to import; nothing is said of its version."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str | None:
        """Of the installed distribution; None without one."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def wrong_version(self) -> str | None:
        """What is wrong with the installed version; None when it can be used."""
        if not self.least:
            return None
        found = self.version
        if found is None:
            return f"{self.module} can be imported, but no {self.distribution} is installed to tell its version"
        if _numbers(self.least) <= _numbers(found) < _numbers(self.below):
            return None
        return f"{self.distribution} {found} is installed; {self.least} to below {self.below} can be used"


def _numbers(version: str) -> tuple[int, ...]:
    """Of the release: "0.6.1.post2+cu12" and "0.6.1rc1" are (0, 6, 1)."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in release.group().split(".")) if release else ()
