"""The chart's tests. Those in chart/ need tools from outside and run by `make helm-test`, the others everywhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)

collect_ignore = [] if os.environ.get("TANDEM_HELM_TOOLS") else ["chart"]
