from __future__ import annotations

import fcntl
import gc
import mmap
import os
from typing import Any

import pytest

from kv_transfer import pool as pool_module
from kv_transfer.pool import LocalPool, PoolView, SharedPool
from tandem.errors import ConfigError


@pytest.mark.parametrize("kind", [LocalPool, SharedPool])
def test_shape_of_a_pool(kind: Any) -> None:
    pool = kind(5, 96)
    assert (pool.num_blocks, pool.block_bytes, pool.buffer.nbytes) == (5, 96, 480)
    assert list(pool.generations) == [0] * 5
    pool.generations[4] = 2**63
    pool.buffer[:] = b"\xff" * 480
    assert list(pool.generations) == [0, 0, 0, 0, 2**63]


@pytest.mark.parametrize("kind", [LocalPool, SharedPool])
@pytest.mark.parametrize("sizes", [(0, 8), (8, 0), (-1, 8), (1 << 40, 1 << 40)])
def test_impossible_sizes(kind: Any, sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError):
        kind(*sizes)


def test_memory_is_not_touched_before_use() -> None:
    pool = SharedPool(1 << 20, 1 << 20)
    assert os.fstat(pool.read_only_fd).st_blocks * 512 < 1 << 16
    pool.close()


def test_what_readers_get_cannot_be_written_or_resized() -> None:
    pool = SharedPool(4, 4096)
    fd = pool.read_only_fd
    with pytest.raises(OSError, match=r"not permitted|denied"):
        mmap.mmap(fd, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    for size in (0, 1 << 24):
        with pytest.raises(PermissionError):
            os.ftruncate(writable, size)
    with pytest.raises(PermissionError):
        os.write(writable, b"x")
    os.close(writable)
    pool.buffer[0] = 1
    pool.close()


def test_old_kernel_without_the_writer_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_F_SEAL_FUTURE_WRITE", 1 << 30)
    pool = SharedPool(4, 64)
    seals = fcntl.fcntl(pool.read_only_fd, fcntl.F_GET_SEALS)
    assert seals & fcntl.F_SEAL_SHRINK
    pool.close()


def test_close_keeps_the_memory_of_those_who_look_and_leaks_nothing() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    pool = SharedPool(4, 64)
    view = pool.buffer[64:128]
    view[:] = b"a" * 64
    pool.close()
    pool.close()
    assert bytes(view) == b"a" * 64
    with pytest.raises(ConfigError):
        _ = pool.read_only_fd
    del view
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_errors_of_the_system_are_config_errors_and_leak_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def fail(*_: Any) -> Any:
        raise OSError(12, "out of memory")

    for name in ("ftruncate", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(ConfigError):
                SharedPool(4, 64)
    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", fail)
        with pytest.raises(ConfigError, match="can't reserve 256"):
            LocalPool(4, 64)
    with monkeypatch.context() as patch:
        patch.setattr(pool_module.sys, "platform", "darwin")
        with pytest.raises(ConfigError, match="grpc"):
            SharedPool(4, 64)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_view_checks_its_sizes() -> None:
    generations = memoryview(bytearray(16)).cast("Q")
    view = PoolView(memoryview(bytearray(64)), 32, 2, generations)
    assert view.buffer.nbytes == 64
    with pytest.raises(ConfigError):
        PoolView(memoryview(bytearray(63)), 32, 2, generations)
    with pytest.raises(ConfigError):
        PoolView(memoryview(bytearray(96)), 32, 3, generations)
