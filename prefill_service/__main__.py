"""`python -m prefill_service --model PATH ...`: one prefill worker."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from prefill_service.flags import parse_flags
from tandem.errors import ConfigError
from tandem.service.server import run


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 after an orderly end, 2 with one line on stderr when it can't start."""
    try:
        flags = parse_flags(sys.argv[1:] if argv is None else argv)
        # Imported late: torch takes seconds, a wrong flag should not.
        from prefill_service.wiring import serve
    except ConfigError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 2
    return run(lambda: serve(flags))


if __name__ == "__main__":
    sys.exit(main())
