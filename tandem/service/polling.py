"""How gRPC's core waits for its sockets: chosen in the environment, which it reads once, when grpc is loaded.

Since 1.85 Python's gRPC reads sockets on threads of its own ("event engine") and hands what came to the thread that
Python waits on; before, that one read itself. Where all cores are busy, as on a small machine that serves and computes,
the way round costs a stream's reader a quarter of its time for each message, and the server a twentieth. The old way is
still there in the versions named here; in others nothing is changed.

Knows nothing of grpc itself: importing this must not load it.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version

VERSIONS = ("1.85.",)
EXPERIMENTS = (
    "event_engine_client",
    "event_engine_listener",
    "event_engine_callback_cq",
    "event_engine_for_all_other_endpoints",
    "event_engine_fork",
)
VARIABLE = "GRPC_EXPERIMENTS"


def read_where_python_waits() -> None:
    """For the processes of Tandem, before they load grpc. Who has set the variable has chosen, and that stays."""
    if "grpc" in sys.modules:
        return
    try:
        known = version("grpcio").startswith(VERSIONS)
    except PackageNotFoundError:
        return
    if known:
        os.environ.setdefault(VARIABLE, ",".join(f"-{name}" for name in EXPERIMENTS))
