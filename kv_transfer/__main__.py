"""`python -m kv_transfer` prints the transports of this machine as one JSON object; `tandem doctor` reads it."""

from __future__ import annotations

import json
import sys

from kv_transfer.registry import available

sys.stdout.write(json.dumps({"transports": available()}) + "\n")
