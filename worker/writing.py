"""How long a call's writer may write."""

from __future__ import annotations

import asyncio


async def until_first(writer: asyncio.Task[None], failed: asyncio.Future[None]) -> None:
    """Until the writer is through, or `failed` has its exception, which is raised: even while the client holds up a
    write. The writer is over when this returns.
    """
    try:
        await asyncio.wait({writer, failed}, return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            failed.result()
        await writer
    finally:
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
