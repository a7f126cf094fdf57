"""gRPC channels as every client of Tandem opens them: limits, keepalive, quick reconnects."""

from __future__ import annotations

from typing import Any

import grpc

from tandem.errors import ConfigError
from tandem.service import address as addresses
from tandem.service.tls import ChannelTls, Tls

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
        # What gRPC really waits for the answer to a ping, by default a minute. On a slow network the KV that is sent
        # stands in its way: transfers have beats of their own.
        ("grpc.http2.ping_timeout_ms", 60_000 if for_bulk else 5_000),
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


def open_channel(address: str, *, for_bulk: bool = False, tls: ChannelTls | None = None) -> grpc.aio.Channel:
    """An asyncio channel to HOST:PORT (or a gRPC target such as dns:///NAME:PORT). Connects lazily. In clear without
    `tls`.
    """
    options = channel_options(address, for_bulk=for_bulk)
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls.credentials, options=[*options, *_name_options(tls)])


def open_service_channel(address: str, role: str, tls: Tls | None, *, for_bulk: bool = False) -> grpc.aio.Channel:
    """A channel to a service of `role`, with this process's certificate where it has one."""
    return open_channel(address, for_bulk=for_bulk, tls=tls.channel(role) if tls is not None else None)


def open_blocking_channel(address: str, *, tls: ChannelTls | None = None) -> grpc.Channel:
    """`open_channel` for blocking code: the CLI and `Client`."""
    options = channel_options(address)
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, tls.credentials, options=[*options, *_name_options(tls)])


def _name_options(tls: ChannelTls) -> list[tuple[str, Any]]:
    return [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []


def _is_loopback(target: str) -> bool:
    try:
        return addresses.parse(target).is_loopback
    except ConfigError:
        return False
