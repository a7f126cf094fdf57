"""A worker and its server, together. Each service's `assembly` builds one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tandem.service.server import ServerShell
from worker.worker import Worker


@dataclass(slots=True)
class Assembly:
    """A worker in a server that is not started yet."""

    shell: ServerShell
    worker: Worker[Any]

    async def start(self) -> str:
        """Engine, then server; returns the bound HOST:PORT."""
        self.worker.start()
        self.shell.set_life(lambda: self.worker.engine.alive)
        address = await self.shell.start()
        self.shell.set_serving(True)
        return address

    async def close(self) -> None:
        """After the server has stopped."""
        await self.worker.stop()
