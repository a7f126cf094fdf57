"""Makes the helpers beside this file importable, and the gateway's fake API server."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parents[1] / "gateway"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
