"""What a gateway's pod has of the cluster: its service account's folder and an API server of EndpointSlices."""

from __future__ import annotations

import asyncio
import ssl
import threading
from pathlib import Path
from typing import Any

from certificates import Authority
from chart_tools import NAMESPACE
from fake_kubernetes import FakeKubernetes

TOKEN = "the-token-of-the-gateways-account"


class ApiServer:
    """Started when made, on 127.0.0.1 with TLS; `close` at the end. `account` is the folder that the kubelet mounts."""

    def __init__(self, folder: Path) -> None:
        self.account = folder / "account"
        self.account.mkdir(parents=True)
        authority = Authority(self.account, "ca")
        issued = authority.issue("api", "kubernetes")
        (self.account / "ca.crt").write_bytes(authority.ca.read_bytes())
        (self.account / "token").write_text(TOKEN)
        (self.account / "namespace").write_text(NAMESPACE)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(issued.cert, issued.key)
        self.fake = FakeKubernetes()
        self.fake.tokens = {TOKEN}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self.fake.start(context))

    @property
    def environment(self) -> dict[str, str]:
        """As every pod has it."""
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.fake.port)}

    def publish(self, service: str, address: str, *, ready: bool) -> None:
        """What the controller of EndpointSlices does when a pod's readiness changes."""

        async def put() -> None:
            conditions = {"ready": ready, "serving": ready, "terminating": not ready}
            self.fake.put(f"{service}-1", service, {"addresses": [address], "conditions": conditions})

        self._run(put())

    def close(self) -> None:
        """Ends every watch."""
        self._run(self.fake.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)
