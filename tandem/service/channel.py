"""gRPC channels as every client of Tandem opens them: limits, keepalive, quick reconnects, retries where asked for."""

from __future__ import annotations

import json
from typing import Any

import grpc

from tandem.errors import ConfigError
from tandem.service import address as addresses

MAX_MESSAGE_BYTES = 64 << 20
BULK_WINDOW_BYTES = 8 << 20

_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": "tandem.v1.InferenceService"}],
            # gRPC retries only while no response header has arrived: a server that sends them after admission is asked
            # once.
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def channel_options(target: str, *, for_bulk: bool = False, retries: bool = False) -> list[tuple[str, Any]]:
    """Options of a client channel.

    `for_bulk` gives a connection of its own with large windows, so that KV bytes never stand in front of control
    messages. `retries` sets the public API's service config (UNAVAILABLE, before response headers).
    """
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", 64 << 10),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # A restarted worker should be found at once, not after the default two minutes of backoff.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_retries", int(retries)),
        ("grpc.enable_http_proxy", int(not _is_loopback(target))),
    ]
    if retries:
        options.append(("grpc.service_config", json.dumps(_RETRIES)))
    if for_bulk:
        options += [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.http2.lookahead_bytes", BULK_WINDOW_BYTES),
            ("grpc.http2.write_buffer_size", BULK_WINDOW_BYTES),
        ]
    return options


def open_channel(address: str, *, for_bulk: bool = False, retries: bool = False) -> grpc.aio.Channel:
    """An asyncio channel to HOST:PORT (or a gRPC target such as dns:///NAME:PORT). Connects lazily."""
    return grpc.aio.insecure_channel(address, options=channel_options(address, for_bulk=for_bulk, retries=retries))


def open_blocking_channel(address: str, *, retries: bool = False) -> grpc.Channel:
    """The same for blocking code: the CLI and `Client`."""
    return grpc.insecure_channel(address, options=channel_options(address, retries=retries))


def _is_loopback(target: str) -> bool:
    try:
        return addresses.parse(target).is_loopback
    except ConfigError:
        return False
