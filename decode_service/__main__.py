"""`python -m decode_service --model PATH ...`: one decode worker."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from decode_service.flags import Flags, parse_flags
from worker import process


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 after an orderly end, 2 with one line on stderr when it can't start."""
    return process.main(argv, parse_flags, _serve)


async def _serve(flags: Flags) -> int:
    # Imported late: torch takes seconds, a wrong flag should not.
    from decode_service.wiring import serve

    return await serve(flags)


if __name__ == "__main__":
    sys.exit(main())
