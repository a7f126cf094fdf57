"""EndpointSlices (discovery.k8s.io/v1) to addresses. Pure: JSON objects in, HOST:PORT out.

A Service has several slices: of at most a hundred endpoints each, one set an address family. All are merged; a pod that
is in several of them (two families, or moved between slices) is one worker, IPv4 where it has both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tandem.service.address import Address

FAMILIES = ("IPv4", "IPv6")


def slice_key(item: Mapping[str, Any]) -> str:
    """Names a slice for as long as it is there. Raises KeyError or TypeError for what is no object of the API."""
    metadata = item["metadata"]
    return f"{metadata.get('namespace', '')}/{metadata['name']}"


def addresses_of(slices: Iterable[Mapping[str, Any]], port_name: str) -> tuple[str, ...]:
    """Workers that take new work: endpoints that are ready (so serving, and not terminating), at the port of that
    name, or the only port. Sorted.
    """
    found: dict[str, tuple[int, str]] = {}
    for item in slices:
        family, port = item.get("addressType"), _port(item.get("ports") or (), port_name)
        if family not in FAMILIES or port is None:
            continue
        rank = FAMILIES.index(family)
        for endpoint in item.get("endpoints") or ():
            if (hosts := endpoint.get("addresses")) and _takes_work(endpoint.get("conditions") or {}):
                # The addresses of one endpoint are alternatives; the API says to use the first.
                address = str(Address(str(hosts[0]), port))
                who = _identity(endpoint) or address
                found[who] = min(found.get(who, (len(FAMILIES), "")), (rank, address))
    return tuple(sorted({address for _, address in found.values()}))


def _port(ports: Iterable[Mapping[str, Any]], name: str) -> int | None:
    """None: the slice has no such port."""
    listed = [port for port in ports if isinstance(port.get("port"), int) and port.get("protocol", "TCP") == "TCP"]
    named = [port for port in listed if port.get("name") == name]
    chosen = named or (listed if len(listed) == 1 else [])
    return int(chosen[0]["port"]) if chosen else None


def _takes_work(conditions: Mapping[str, Any]) -> bool:
    """A condition that is unset counts as true for `ready` and `serving`, as the API says, and false for
    `terminating`. A Service that publishes pods that aren't ready says ready of terminating ones.
    """
    ready, serving, terminating = (conditions.get(name) for name in ("ready", "serving", "terminating"))
    return ready is not False and serving is not False and not terminating


def _identity(endpoint: Mapping[str, Any]) -> str:
    reference = endpoint.get("targetRef") or {}
    return str(reference.get("uid") or "")
