"""Tandem: serving for large language models with prefill and decode apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tandem.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the clients (and with them grpc) only when they are used."""
    if name in {"AsyncClient", "Client"}:
        from tandem import client

        return getattr(client, name)
    raise AttributeError(f"module 'tandem' has no attribute {name!r}")
