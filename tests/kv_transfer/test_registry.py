from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import fake_nixl
import pytest

from kv_transfer import registry
from kv_transfer.pool import LocalPool, SharedPool
from tandem.errors import ConfigError, IncompatibleError


@pytest.mark.parametrize("wheel", [False, True], ids=["no NIXL", "NIXL"])
def test_available_is_what_can_be_made(monkeypatch: pytest.MonkeyPatch, wheel: bool) -> None:
    monkeypatch.setattr(registry.nixl_agent, "installed", lambda: wheel)
    pool = SharedPool(2, 8)
    assert registry.available() == (["shm", "nixl", "grpc"] if wheel else ["shm", "grpc"])
    for name in registry.available():
        source, target = registry.source_transport(name, pool, "i"), registry.target_transport(name)
        assert source.name == target.name == name
        source.close()
        target.close()
    pool.close()


def test_without_linux_only_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.sys, "platform", "darwin")
    monkeypatch.setattr(registry.nixl_agent, "installed", lambda: False)
    assert registry.available() == ["grpc"]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"carrier.*shm, nixl, grpc"):
        registry.source_transport("carrier", LocalPool(1, 1), "i")
    with pytest.raises(ConfigError, match=r"carrier.*shm, nixl, grpc"):
        registry.target_transport("carrier")


@pytest.mark.parametrize(
    ("source", "target", "chosen"),
    [
        (["shm", "grpc"], ["grpc", "shm"], "shm"),
        (["shm", "grpc"], ["grpc"], "grpc"),
        (["grpc"], ["shm", "grpc"], "grpc"),
        (["shm", "nixl", "grpc"], ["shm", "nixl", "grpc"], "shm"),
        (["nixl", "grpc"], ["shm", "nixl", "grpc"], "nixl"),
        (["shm", "nixl", "grpc"], ["grpc"], "grpc"),
    ],
)
def test_choose(source: list[str], target: list[str], chosen: str) -> None:
    assert registry.choose(source, target) == chosen


def test_require_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.require("grpc")
    with pytest.raises(ConfigError, match=r"carrier.*grpc"):
        registry.require("carrier")
    monkeypatch.setattr(registry.nixl_agent, "installed", lambda: False)
    with pytest.raises(ConfigError, match="pip install --no-deps nixl-cu12"):
        registry.require("nixl")


def test_require_refuses_a_wheel_whose_agents_are_not_known(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.use_fake_nixl(monkeypatch)
    registry.require("nixl")
    monkeypatch.setattr(fake_nixl.nixl_agent, "get_agent_metadata", lambda self: b"nixl2|agent")
    with pytest.raises(ConfigError, match=r"knows those of 1\.5"):
        registry.require("nixl")


def test_shared_memory_is_for_one_host() -> None:
    here, there = ["shm", "nixl", "grpc"], ["shm", "grpc"]
    assert registry.choose(here, there) == "shm"
    assert registry.choose(here, there, one_host=False) == "grpc"
    assert registry.choose(here, here, one_host=False) == "nixl"
    with pytest.raises(IncompatibleError, match="on another host"):
        registry.choose(["shm"], ["shm"], one_host=False)


def test_the_host_is_machine_namespace_and_user(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = registry.host_id()
    assert mine == registry.host_id() != ""
    monkeypatch.setattr(registry.os, "geteuid", lambda: 12345)
    assert registry.host_id() not in (mine, "")
    monkeypatch.setattr(registry, "Path", lambda _: Path("/no/such/file"))
    assert registry.host_id() == ""


def test_nothing_in_common_names_both() -> None:
    with pytest.raises(IncompatibleError, match=r"shm.*grpc"):
        registry.choose(["shm"], ["grpc"])
    with pytest.raises(IncompatibleError):
        registry.choose([], ["grpc"])


def test_the_module_prints_what_this_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("kv_transfer", run_name="__main__")
    assert json.loads(capsys.readouterr().out) == {"transports": registry.available()}
