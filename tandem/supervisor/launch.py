"""Becomes a worker that dies with its supervisor: `python -I -S launch.py SUPERVISOR_PID COMMAND...`.

Run as a file, so that it starts in milliseconds. The parent-death signal survives exec, and no code has to run between
fork and exec in the supervisor, whose threads may hold locks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Asks for SIGKILL when the supervisor dies, makes sure that it lives still, and becomes the command."""
    supervisor, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:
        sys.exit(1)
    os.execv(command[0], command)  # noqa: S606  # the supervisor's own command line


if __name__ == "__main__":
    main()
