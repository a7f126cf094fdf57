"""gRPC channels as every client of Tandem opens them: limits, keepalive, quick reconnects."""

from __future__ import annotations

from typing import Any

import grpc

from tandem.errors import ConfigError
from tandem.service import address as addresses

MAX_MESSAGE_BYTES = 64 << 20
BULK_WINDOW_BYTES = 8 << 20


def channel_options(target: str, *, for_bulk: bool = False) -> list[tuple[str, Any]]:
    """Options of a client channel.

    `for_bulk` gives a connection of its own with large windows, so that KV bytes never stand in front of control
    messages. gRPC's own retries are off: who calls knows what may be repeated.
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
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", int(not _is_loopback(target))),
    ]
    if for_bulk:
        options += [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.http2.lookahead_bytes", BULK_WINDOW_BYTES),
            ("grpc.http2.write_buffer_size", BULK_WINDOW_BYTES),
        ]
    return options


def open_channel(address: str, *, for_bulk: bool = False) -> grpc.aio.Channel:
    """An asyncio channel to HOST:PORT (or a gRPC target such as dns:///NAME:PORT). Connects lazily."""
    return grpc.aio.insecure_channel(address, options=channel_options(address, for_bulk=for_bulk))


def open_blocking_channel(address: str) -> grpc.Channel:
    """The same for blocking code: the CLI and `Client`."""
    return grpc.insecure_channel(address, options=channel_options(address))


def _is_loopback(target: str) -> bool:
    try:
        return addresses.parse(target).is_loopback
    except ConfigError:
        return False
