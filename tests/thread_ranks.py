"""Ranks that are threads of one process: `engine.parallel.group.Ranks` without sockets and process groups."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

SECONDS = 60.0


class Meeting:
    """Where `size` threads bring their parts and take everybody's, and where the steps wait."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=SECONDS)
        self.steps: queue.Queue[bytearray | None] = queue.Queue()

    def exchange(self, rank: int, part: Any) -> list[Any]:
        """Everybody's, in the order of the ranks."""
        self.parts[rank] = part
        self.barrier.wait()
        found = [one.clone() if isinstance(one, Tensor) else one for one in self.parts]
        self.barrier.wait()
        return found


class ThreadRanks:
    """One of them. With more than two ranks `send` would need a queue each."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self.leads = rank, meeting.size, rank == 0
        self._meeting = meeting
        self._releases: list[Callable[[], None]] = []

    def total(self, part: Tensor) -> Tensor:
        first, *others = self._meeting.exchange(self.rank, part)
        for other in others:
            first += other
        return first

    def side_by_side(self, part: Tensor, columns: int) -> Tensor:
        return torch.cat(self._meeting.exchange(self.rank, part), 1)[:, :columns].contiguous()

    def share(self, values: Tensor) -> None:
        values.copy_(self._meeting.exchange(self.rank, values)[0])

    def least(self, number: int) -> int:
        return min(self._meeting.exchange(self.rank, number))

    def meet(self) -> None:
        self._meeting.exchange(self.rank, None)

    def agree(self, what: bytes) -> None:
        assert len(set(self._meeting.exchange(self.rank, what))) == 1

    def send(self, message: bytes) -> None:
        self._meeting.steps.put(bytearray(message))

    def receive(self) -> bytearray | None:
        return self._meeting.steps.get(timeout=SECONDS)

    def at_close(self, release: Callable[[], None]) -> None:
        self._releases.append(release)

    def close(self) -> None:
        self._meeting.steps.put(None)
        for release in self._releases:
            release()

    def fail(self, problem: str) -> NoReturn:
        self._meeting.barrier.abort()
        raise AssertionError(problem)
