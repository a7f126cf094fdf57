"""`python -m kernels` prints `describe()` as one JSON object; `tandem doctor` reads it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kernels.dispatch import describe
from tandem.errors import ConfigError

DRIVERS = ("/proc/driver/nvidia/version", "/dev/kfd")

try:
    found = describe()
    if any(Path(driver).exists() for driver in DRIVERS):  # torch is asked only then: importing it takes seconds
        from kernels import backends

        found |= backends.describe()
    sys.stdout.write(json.dumps(found) + "\n")
except ConfigError as exc:
    sys.exit(f"error: {exc}")
