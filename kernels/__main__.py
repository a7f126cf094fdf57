"""`python -m kernels` prints `describe()` as one JSON object; `tandem doctor` reads it."""

from __future__ import annotations

import json
import sys

from kernels.dispatch import describe
from tandem.errors import ConfigError

try:
    sys.stdout.write(json.dumps(describe()) + "\n")
except ConfigError as exc:
    sys.exit(f"error: {exc}")
