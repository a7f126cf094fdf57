"""Which workers a gateway sees, by its plain HTTP port: for that neither a certificate nor an API key is needed."""

from __future__ import annotations

import asyncio
import json

from tandem.service.address import Address

SECONDS = 2.0
MAX_BYTES = 1 << 20


async def listed(http: Address) -> list[tuple[int, int]]:
    """(prefill, decode) workers of each model that the gateway at `http` serves now; empty when it doesn't answer."""
    try:
        async with asyncio.timeout(SECONDS):
            body = await _get(http, "/workers")
        models = json.loads(body)["models"]
        return [(int(model["prefill_workers"]), int(model["decode_workers"])) for model in models]
    except (OSError, TimeoutError, ValueError, KeyError, TypeError):
        return []


async def _get(http: Address, path: str) -> bytes:
    reader, writer = await asyncio.open_connection(http.host, http.port, limit=MAX_BYTES)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\n\r\n".encode())
        data = await reader.read(MAX_BYTES)
        while not reader.at_eof() and len(data) < MAX_BYTES:
            data += await reader.read(MAX_BYTES)
    finally:
        writer.close()
    head, _, body = data.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise ValueError(f"{http}{path}: {head[:64]!r}")
    return body
