"""An API server that knows EndpointSlices: lists and watches as the real one does, and fails on command."""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import Any
from urllib.parse import parse_qs, urlsplit


class FakeKubernetes:
    """`faults` are used up, one a request: expired (410), expired-event, junk, cut, refuse, end, hang. A watch is over
    after `watch_seconds`. Versions before `oldest` are gone.
    """

    def __init__(self) -> None:
        self.version, self.oldest, self.watch_seconds = 100, 0, 60.0
        self.slices: dict[str, dict[str, Any]] = {}
        self.events: list[tuple[int, dict[str, Any]]] = []
        self.faults: list[str] = []
        self.tokens: set[str] | None = None
        """Those that are taken; None: no token is asked for."""
        self.requests: list[dict[str, str]] = []
        self.port, self._server, self._changed = 0, None, asyncio.Event()
        self._tasks: set[Any] = set()

    async def start(self, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        await self.hang_up()

    @property
    def connections(self) -> int:
        """Those that are open, or wait for a request."""
        return len(self._tasks)

    async def hang_up(self) -> None:
        """Every connection breaks off."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def put(self, name: str, service: str, *endpoints: dict[str, Any], **more: Any) -> None:
        """Adds or changes a slice. More: addressType, ports."""
        kind = "MODIFIED" if name in self.slices else "ADDED"
        labels = {"kubernetes.io/service-name": service}
        item = {"metadata": {"name": name, "namespace": "models", "labels": labels}, "addressType": "IPv4"}
        item |= {"ports": [{"name": "grpc", "port": 7001, "protocol": "TCP"}], "endpoints": list(endpoints), **more}
        self._event(kind, item)

    def delete(self, name: str) -> None:
        self._event("DELETED", self.slices[name])

    def bookmark(self) -> None:
        self._event("BOOKMARK", {"kind": "EndpointSlice", "metadata": {}})

    def _event(self, kind: str, item: dict[str, Any]) -> None:
        self.version += 1
        item = {**item, "metadata": {**item["metadata"], "resourceVersion": str(self.version)}}
        if kind == "DELETED":
            del self.slices[item["metadata"]["name"]]
        elif kind != "BOOKMARK":
            self.slices[item["metadata"]["name"]] = item
        self.events.append((self.version, {"type": kind, "object": item}))
        self._changed.set()
        self._changed = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            url = urlsplit(head.split(" ")[1])
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            self.requests.append({**query, "path": url.path})
            fault = self.faults.pop(0) if self.faults else ""
            if self.tokens is not None and not any(f"Bearer {token}\r\n" in head for token in self.tokens):
                self._answer(writer, 401, {"kind": "Status", "code": 401, "message": "Unauthorized"})
            elif fault == "refuse":
                self._answer(writer, 403, {"kind": "Status", "code": 403, "message": "endpointslices is forbidden"})
            elif "watch" not in query:
                items = [item for item in self.slices.values() if _matches(item, query)]
                self._answer(writer, 200, {"metadata": {"resourceVersion": str(self.version)}, "items": items})
            elif fault == "expired" or int(query["resourceVersion"]) < self.oldest:
                self._answer(writer, 410, {"kind": "Status", "code": 410, "message": "too old resource version"})
            else:
                await self._watch(query, fault, writer)
        except asyncio.CancelledError:
            pass  # asyncio's server would log it
        finally:
            self._tasks.discard(asyncio.current_task())
            writer.close()

    def _answer(self, writer: asyncio.StreamWriter, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status} Whatever\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

    async def _watch(self, query: dict[str, str], fault: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        first = {
            "expired-event": b'{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}\n',
            "junk": b'{"type":"ADDED","obj\n',
        }.get(fault)
        if first:
            writer.write(_chunks(first))
        if fault == "cut":
            return
        if fault == "hang":
            await asyncio.Event().wait()
        at, end = int(query["resourceVersion"]), asyncio.get_running_loop().time() + self.watch_seconds
        while fault != "end" and (left := end - asyncio.get_running_loop().time()) > 0:
            changed = self._changed
            for version, event in self.events:
                if version > at and (event["type"] == "BOOKMARK" or _matches(event["object"], query)):
                    writer.write(_chunks(json.dumps(event).encode() + b"\n"))
            at = self.version
            await asyncio.wait({asyncio.ensure_future(changed.wait())}, timeout=left)
        writer.write(b"0\r\n\r\n")


def _chunks(data: bytes) -> bytes:
    """In two pieces, since chunks and lines need not agree."""
    pieces = (data[: len(data) // 2], data[len(data) // 2 :])
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


def _matches(item: dict[str, Any], query: dict[str, str]) -> bool:
    key, _, value = query["labelSelector"].partition("=")
    return bool(item["metadata"].get("labels", {}).get(key) == value)
