"""`python -m tandem.cli` is `tandem`."""

from __future__ import annotations

from tandem.cli import main

main()
