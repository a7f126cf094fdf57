"""Workers behind Services of Kubernetes, followed by their EndpointSlices (`--workers-endpointslices ROLE=SELECTOR`).

What a pod's readiness says comes at once, without DNS in between. One watch a role; the service account needs `list`
and `watch` of `endpointslices` in `discovery.k8s.io`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.discovery.kubernetes import Api, Watch
from gateway.discovery.slices import addresses_of
from gateway.discovery.source import Addresses, Report, Role
from tandem.service.logging import get_logger

_log = get_logger(__name__)
SERVICE_LABEL = "kubernetes.io/service-name"


def selector_of(text: str) -> str:
    """A label selector; a bare name means the slices of the Service of that name."""
    plain = text.strip()
    bare = plain and not any(character in plain for character in "=!,( ")
    return f"{SERVICE_LABEL}={plain}" if bare else plain


@dataclass(frozen=True)
class Selection:
    """Which slices, and which of their ports."""

    namespace: str
    selectors: Mapping[Role, str]
    port_name: str = "grpc"


class EndpointSlices:
    """One watch a role."""

    def __init__(self, api: Api, selection: Selection, *, first_pause: float = 0.5) -> None:
        """`first_pause`: seconds before the first retry."""
        self._api, self._selection, self._first_pause = api, selection, first_pause
        self._known: dict[Role, tuple[str, ...]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, report: Report) -> None:
        """The first lists are asked for."""
        path = f"/apis/discovery.k8s.io/v1/namespaces/{self._selection.namespace}/endpointslices"
        for role, selector in self._selection.selectors.items():

            def changed(items: list[Mapping[str, Any]], role: Role = role) -> None:
                self._learn(role, items, report)

            watch = Watch(self._api, path, selector, changed, report.trouble, first_pause=self._first_pause)
            self._tasks.append(asyncio.create_task(watch.run(), name=f"watch slices of {role}"))

    def _learn(self, role: Role, items: list[Mapping[str, Any]], report: Report) -> None:
        addresses = addresses_of(items, self._selection.port_name)
        if self._known.get(role) == addresses:
            return
        self._known[role] = addresses
        _log.info("workers found", worker_role=role, addresses=list(addresses))
        report.found(Addresses(self._known.get("prefill", ()), self._known.get("decode", ())))

    async def close(self) -> None:
        """Ends the watches."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
