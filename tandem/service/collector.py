"""Python's garbage collector in a process that serves for long."""

from __future__ import annotations

import gc


def freeze_loaded() -> None:
    """What is loaded by now stays: the collector need not look at it again in the middle of a step or a token."""
    gc.collect()
    gc.freeze()
