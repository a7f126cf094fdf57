"""Fixtures of the gateway's tests: the default model's tokenizer, fake workers, and gateways in front of them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

_HERE = str(Path(__file__).parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from gateway_fakes import Cluster, Front  # noqa: E402

from gateway.config import GatewayConfig, Patience  # noqa: E402
from gateway.text import TextService  # noqa: E402
from gateway.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from gateway.wiring import Bindings, Gateway  # noqa: E402
from tandem.service.tls import ChannelTls  # noqa: E402

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _find_model() -> Path:
    """$TANDEM_TEST_MODEL, or where `make setup` and the checkout's neighbours keep the default model."""
    root = Path(__file__).resolve().parents[2]
    places = [root / "models" / MODEL, root / ".models" / MODEL, root.parent / "model" / MODEL]
    places += sorted((root / ".venv").glob(f"lib/*/site-packages/*/{MODEL}"))
    if configured := os.environ.get("TANDEM_TEST_MODEL"):
        places.insert(0, Path(configured))
    found = next((place for place in places if place.is_file()), None)
    assert found is not None, f"the default model {MODEL} is needed: run `make setup` or set TANDEM_TEST_MODEL"
    return found


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The default model's file."""
    return _find_model()


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    """The default model's tokenizer."""
    return load_tokenizer(model_path)


@pytest.fixture
def patience() -> Patience:
    """Short times, so that failures are found soon."""
    return Patience(heartbeat_timeout=1.5, no_worker_grace=0.6, refused_pause=0.05)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """Fake workers; ended with the test."""
    made = Cluster()
    yield made
    await made.close()


StartGateway = Callable[..., Any]


@pytest.fixture
async def serve(
    cluster: Cluster, tokenizer: Tokenizer, model_path: Path, patience: Patience
) -> AsyncIterator[StartGateway]:
    """Starts a gateway in front of the cluster's workers: `await serve(config)` gives a Front."""
    async with AsyncExitStack() as stack:

        async def start(
            wait_ready: bool = True,
            bindings: Mapping[str, Any] | None = None,
            tls: ChannelTls | None = None,
            **settings: Any,
        ) -> Front:
            settings = {"patience": patience, **settings}
            return await stack.enter_async_context(
                _front(cluster, tokenizer, model_path, wait_ready, settings, bindings or {}, tls)
            )

        yield start


@asynccontextmanager
async def _front(
    cluster: Cluster,
    tokenizer: Tokenizer,
    model: Path,
    wait_ready: bool,
    settings: dict[str, Any],
    more: Mapping[str, Any],
    tls: ChannelTls | None,
) -> AsyncIterator[Front]:
    bindings = Bindings(
        str(model),
        "127.0.0.1:0",
        "127.0.0.1:0",
        prefill=[worker.address for worker in cluster.prefill],
        decode=[worker.address for worker in cluster.decode],
        **more,
    )
    gateway = Gateway(bindings, GatewayConfig(**settings), TextService(tokenizer))
    await gateway.start()
    front = Front(gateway, tls)
    try:
        if wait_ready:
            await front.until_ready(len(cluster.prefill), len(cluster.decode))
        yield front
    finally:
        with contextlib.suppress(Exception):
            await front.channel.close()
        await gateway.close()
