"""The ranks of one worker as one of them sees them: sums over all, and the line between rank 0 and the others.

Life cycle: `join_ranks` -> each loads its part, memory goes over the line -> `agree`: all have loaded the same ->
`ready` -> rank 0 sends steps, all compute them -> `close`. From `ready` on no process can do without the others: the
first that finds one gone, or a step of its own failed, says so and ends, and so do they all.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Final, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from engine.parallel import line
from engine.parallel.watch import Watch
from engine.parallel.world import World
from tandem.errors import ConfigError

PATIENCE: Final = timedelta(seconds=180)
"""How long a rank waits for the others: at the start, and for their share of a sum."""

Fail = Callable[[str], NoReturn]


def end_process(problem: str) -> NoReturn:
    """One line on stderr, and exit code 1 at once: threads may hang in sums that never come."""
    sys.stderr.write(f"error: {problem}\n")
    sys.stderr.flush()
    os._exit(1)


class Ranks:
    """`engine.parallel.layers.Collectives` over `torch.distributed`, and the line."""

    def __init__(self, world: World, lines: list[socket.socket], fail: Fail = end_process) -> None:
        """`lines`: on rank 0 those to the others, in order; else the one to rank 0. See `join_ranks`."""
        self.rank, self.size, self.leads = world.rank, world.size, world.leads
        self._lines, self.fail = lines, fail
        self._watch: Watch | None = None
        self._releases: list[Callable[[], None]] = []

    # -- sums

    def total(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, the same bits on each.

        One rank after another, whatever the shape: a ring would take each piece of a tensor in its own order, and a
        row's bits would depend on how many there are. On a GPU, which promises no bits, as NCCL likes; in place.
        """
        if part.is_cuda:
            dist.all_reduce(part)
            return part
        parts = self._gather(part)
        for other in parts[1:]:
            parts[0].add_(other)
        return parts[0]

    def side_by_side(self, part: Tensor, columns: int) -> Tensor:
        """All ranks' columns [R, N], the first `columns` of them: [R, columns]."""
        parts = self._gather(part)
        padding = sum(one.shape[1] for one in parts) - columns
        whole = torch.cat(parts, 1)
        return whole[:, :columns].contiguous() if padding else whole

    def share(self, values: Tensor) -> None:
        """Rank 0's values, in place on the others."""
        dist.broadcast(values, src=0)

    def least(self, number: int) -> int:
        """The least of all ranks' numbers. Raises ConfigError when one has ended, as long as they load."""
        try:
            return min(int(one) for one in self._gather(torch.tensor([number])))
        except RuntimeError as error:
            raise ConfigError(f"rank {self.rank}: another rank ended while it loaded: {error}") from error

    def meet(self) -> None:
        """Returns when all ranks have come here."""
        self._gather(torch.zeros(1))

    def _gather(self, part: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part)
        return parts

    # -- while they load

    def lend(self, rank: int, fd: int) -> None:
        """On rank 0: give `rank` a descriptor; returns when that has taken it. Raises ConfigError."""
        try:
            line.send_descriptor(self._lines[rank - 1], fd)
        except OSError as error:
            raise _ended_early(rank) from error
        self._from(rank)

    def borrow(self, take: Callable[[int], memoryview]) -> memoryview:
        """On another rank: `take` what rank 0 lends. Raises ConfigError."""
        fd = line.receive_descriptor(self._lines[0])
        if fd is None:
            raise ConfigError(f"rank {self.rank}: rank 0 ended while it loaded")
        try:
            memory = take(fd)
        finally:
            os.close(fd)
        self._to_leader(b"taken")
        return memory

    def agree(self, what: bytes) -> None:
        """This rank has loaded; `what` digests what. On rank 0 it returns when all have.

        Raises ConfigError on rank 0 for a rank that ended, or has loaded something else.
        """
        if not self.leads:
            self._to_leader(what)
            return
        for rank in range(1, self.size):
            if self._from(rank) != what:
                raise ConfigError(f"rank {rank} was started with other flags, another model or version than rank 0")

    def ready(self) -> None:
        """All ranks have said all that they have to: whoever's line ends now has ended."""
        if self.leads:
            self._watch = Watch(self._lines, self._on_end)

    def _from(self, rank: int) -> bytes:
        message = line.receive(self._lines[rank - 1])
        if not message:
            raise _ended_early(rank)
        return bytes(message)

    def _to_leader(self, message: bytes) -> None:
        try:
            line.send(self._lines[0], message)
        except OSError as error:
            raise ConfigError(f"rank {self.rank}: rank 0 ended while it loaded") from error

    # -- steps

    def send(self, message: bytes) -> None:
        """On rank 0: a step, to all others. Fails the process when one is gone."""
        for rank, one in enumerate(self._lines, 1):
            try:
                line.send(one, message)
            except OSError:
                self._on_end(rank)

    def receive(self) -> bytearray | None:
        """On another rank: the next step; None when rank 0 has said that there are no more. Fails the process when rank
        0 is gone.
        """
        message = line.receive(self._lines[0])
        if message is None:
            self.fail(f"rank {self.rank} of {self.size} ends: rank 0 has ended")
        return message or None

    def _on_end(self, rank: int) -> NoReturn:
        self.fail(
            f"rank {rank} of {self.size} has ended, and this worker can't compute without it; see what that process "
            "said last, and start all ranks anew"
        )

    def at_close(self, release: Callable[[], None]) -> None:
        """`release` is called before the process group ends: graphs that have sums in them hold it, and the group waits
        for them for ever.
        """
        self._releases.append(release)

    def close(self) -> None:
        """On rank 0 the others are told to end. Call it once no step runs. Idempotent."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
            for one in self._lines:
                try:
                    line.send(one, b"")
                except OSError:
                    continue  # it ended by itself
        if self._lines:
            line.close_all(self._lines)
            self._lines = []
        while self._releases:
            self._releases.pop()()
        if dist.is_initialized():
            dist.destroy_process_group()


def join_ranks(world: World, *, gpu: bool = False, fail: Fail = end_process) -> Ranks:
    """Find the other ranks; blocking. `gpu`: each computes on one of the machine's. Raises ConfigError when they don't
    come, or this one has no GPU.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are on this machine; its name may be another address
    if gpu and world.local_rank >= (count := torch.cuda.device_count()):
        raise ConfigError(f"LOCAL_RANK: rank {world.rank} would have GPU {world.local_rank}; torch sees {count}")
    if gpu:
        torch.cuda.set_device(world.local_rank)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=PATIENCE)
        return Ranks(world, _open_lines(world), fail)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"rank {world.rank} of {world.size} didn't find the others at {world.address}:{world.port} "
            f"(MASTER_ADDR, MASTER_PORT): {error}"
        ) from error


def _open_lines(world: World) -> list[socket.socket]:
    """Rank 0 listens before the others know where."""
    name = torch.frombuffer(bytearray(secrets.token_bytes(line.NAME_BYTES)), dtype=torch.uint8)
    listener = line.listen(bytes(name.tolist()), world.size) if world.leads else None
    try:
        dist.broadcast(name, src=0)
        if listener is None:
            return [line.call_leader(bytes(name.tolist()), world.rank)]
        return line.accept_ranks(listener, world.size)
    finally:
        if listener is not None:
            listener.close()


def _ended_early(rank: int) -> ConfigError:
    return ConfigError(f"rank {rank} ended while it loaded: see what that process said")
