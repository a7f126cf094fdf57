"""The Kubernetes API, as far as a watch needs it: where it is, who we are, list and watch of one kind.

Life cycle of a `Watch`: `run()` lists, tells the whole state, follows it by a watch from the list's resourceVersion
(bookmarks move it on), and lists again when the server has forgotten that version (410 Gone, as a status or an event).
Whatever breaks is tried again with growing pauses; what was known stays until a list says otherwise.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from gateway.discovery import http
from gateway.discovery.slices import slice_key
from tandem.errors import ConfigError
from tandem.service.logging import get_logger

_log = get_logger(__name__)

CREDENTIALS = Path("/var/run/secrets/kubernetes.io/serviceaccount")
WATCH_SECONDS = 240
"""After so long the server ends a watch, and another begins where it was."""
FIRST_PAUSE, MOST_PAUSE = 0.5, 30.0
LATE_SECONDS = 30.0
"""One that goes on for so long after that is broken off: whatever is between here and the server may hang."""
SHORT_SECONDS = 1.0
"""A watch that ends sooner is followed by a pause."""
GONE = 410


class ApiError(Exception):
    """The server answered, but not with what was asked for."""

    def __init__(self, status: int, message: str) -> None:
        """`status` is an HTTP status."""
        super().__init__(f"{status}: {message}")
        self.status = status


@dataclass(frozen=True)
class Api:
    """Where the API server is, and the folder with `token`, `ca.crt` and `namespace`, read anew at each request."""

    host: str
    port: int
    tls: bool
    credentials: Path

    @classmethod
    def find(cls, url: str, credentials: Path) -> Api:
        """From `url`, or without one from what every pod's environment says. Raises ConfigError."""
        if not url:
            host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
            port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
            if not host:
                raise ConfigError(
                    "--workers-endpointslices: this is no pod (no KUBERNETES_SERVICE_HOST); give --kubernetes-api"
                )
            url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        parts = urlsplit(url)
        try:
            port_number = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as exc:
            raise ConfigError(f"--kubernetes-api: {url!r} has no valid port") from exc
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise ConfigError(f"--kubernetes-api: {url!r} is not like https://HOST:PORT")
        api = cls(parts.hostname, port_number, parts.scheme == "https", credentials)
        if api.tls:
            api.token()
            api.context()
        return api

    def token(self) -> str:
        """The service account's token; the kubelet renews the file. Raises ConfigError."""
        path = self.credentials / "token"
        try:
            return path.read_text("ascii").strip()
        except (OSError, ValueError) as exc:
            raise ConfigError(f"--kubernetes-credentials: {path} can't be read: {exc}") from exc

    def context(self) -> ssl.SSLContext:
        """TLS that trusts the cluster's authority alone. Raises ConfigError."""
        path = self.credentials / "ca.crt"
        try:
            context = ssl.create_default_context(cafile=str(path))
        except (OSError, ValueError) as exc:
            raise ConfigError(f"--kubernetes-credentials: {path} can't be read: {exc}") from exc
        # Later Pythons ask for key identifiers, which the certificates of many clusters lack.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context

    def namespace(self) -> str:
        """Of this pod. Raises ConfigError."""
        path = self.credentials / "namespace"
        try:
            return path.read_text("utf-8").strip()
        except (OSError, ValueError) as exc:
            raise ConfigError(f"--kubernetes-namespace: it is needed, since {path} can't be read: {exc}") from exc

    def get(self, path: str, **query: str) -> AbstractAsyncContextManager[http.Response]:
        """GET with the token of this moment. In clear no token is sent. Raises OSError or ConfigError."""
        headers = {"Accept": "application/json", "User-Agent": "tandem-gateway"}
        if self.tls:
            headers["Authorization"] = f"Bearer {self.token()}"
        target = f"{path}?{urlencode(query, quote_via=quote)}"
        return http.get(self.host, self.port, target, headers, self.context() if self.tls else None)


class Watch:
    """See the module's life cycle."""

    def __init__(
        self,
        api: Api,
        path: str,
        selector: str,
        changed: Callable[[list[Mapping[str, Any]]], None],
        trouble: Callable[[str], None],
        *,
        draw: Callable[[], float] = random.random,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        """`path` of the collection; `changed` gets all objects after each change; `draw` gives numbers in [0, 1)."""
        self._api, self._path, self._selector = api, path, selector
        self._changed, self._trouble, self._draw = changed, trouble, draw
        self._first_pause = first_pause
        self._items: dict[str, Mapping[str, Any]] = {}
        self._version = ""
        """Empty: list first."""
        self._failures = 0
        self._told = ""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                if not self._version:
                    await self._list()
                reason = await self._watch()
            except ApiError as exc:
                reason = str(exc)
                if exc.status == GONE:
                    self._version = ""
                    # At once, but not again and again.
                    reason, self._failures = (reason if self._failures else ""), max(1, self._failures)
            except Exception as exc:  # whatever it was: a watch that ends would never see a worker again
                reason = str(exc) or repr(exc)
            if reason:
                await self._pause(reason)

    async def _pause(self, reason: str) -> None:
        if self._failures:
            self._version = ""  # what can't be gone on from is not tried for ever
        if reason != self._told:
            _log.warning("can't watch EndpointSlices; what was known stays", selector=self._selector, reason=reason)
        self._told = reason
        self._trouble(reason)
        seconds = min(MOST_PAUSE, self._first_pause * 2 ** min(self._failures, 16))
        self._failures += 1
        await asyncio.sleep(seconds * (0.5 + self._draw() / 2))

    async def _list(self) -> None:
        async with (
            asyncio.timeout(http.CONNECT_SECONDS),
            self._api.get(self._path, labelSelector=self._selector) as response,
        ):
            value = _object(await response.body(), response.status)
        version = value["metadata"]["resourceVersion"]
        self._items = {slice_key(item): item for item in value.get("items") or ()}
        self._version = str(version)
        self._changed(list(self._items.values()))

    async def _watch(self) -> str:
        """Empty when it ended as it should, else what was wrong with its end."""
        began, seconds = time.monotonic(), int(WATCH_SECONDS * (1 + self._draw() / 4))
        try:
            async with asyncio.timeout(seconds + LATE_SECONDS) as limit:
                await self._follow(seconds)
        except TimeoutError:
            if not limit.expired():
                raise
            return "a watch did not end in time"
        if time.monotonic() - began < SHORT_SECONDS:
            return "a watch ended at once"
        self._failures, self._told = 0, ""
        return ""

    async def _follow(self, seconds: int) -> None:
        """One watch, which the server is to end after `seconds`."""
        async with self._api.get(
            self._path,
            labelSelector=self._selector,
            watch="1",
            resourceVersion=self._version,
            allowWatchBookmarks="true",
            timeoutSeconds=str(seconds),
        ) as response:
            if response.status != 200:
                _object(await response.body(), response.status)
            async for line in response.lines():
                if line.strip():
                    self._take(_object(line, 200))

    def _take(self, event: Mapping[str, Any]) -> None:
        """One event of a watch."""
        kind, item = event["type"], event["object"]
        if kind == "ERROR":
            raise ApiError(int(item.get("code") or 500), str(item.get("message") or "the watch failed"))
        version = str(item["metadata"]["resourceVersion"])
        if kind in ("ADDED", "MODIFIED"):
            self._items[slice_key(item)] = item
        elif kind == "DELETED":
            self._items.pop(slice_key(item), None)
        self._version, self._failures, self._told = version, 0, ""
        if kind != "BOOKMARK":
            self._changed(list(self._items.values()))


def _object(text: bytes, status: int) -> Mapping[str, Any]:
    """Raises ApiError for another status than 200, and for what is no JSON object."""
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise ApiError(status, f"no JSON: {text[:80]!r}") from exc
    if not isinstance(value, dict):
        raise ApiError(status, f"no JSON object: {text[:80]!r}")
    if status != 200:
        raise ApiError(status, str(value.get("message") or "refused"))
    return value
