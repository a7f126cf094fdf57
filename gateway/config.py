"""Settings of the gateway: frozen, complete, checked before construction."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.breaker import Ejecting


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. Over a limit is INVALID_ARGUMENT with the field's name."""

    max_prompt_bytes: int = 4 << 20
    max_token_ids: int = 1 << 20
    """In a prompt, in all outputs that a client goes on with together, or to detokenize."""
    max_request_id: int = 128
    max_cache_salt: int = 128
    max_stop_strings: int = 16
    max_stop_characters: int = 256
    max_stop_token_ids: int = 64
    max_logit_bias: int = 300
    max_n: int = 16
    max_logprobs: int = 20
    max_draft_tokens: int = 64
    default_max_tokens: int = 4096


@dataclass(frozen=True)
class Patience:
    """Times in seconds, and how much misfortune one request may have."""

    default_timeout: float = 600.0
    heartbeat_timeout: float = 3.0
    """Three missed heartbeats of one second."""
    no_worker_grace: float = 30.0
    """How long a request waits without any worker: long enough for a lone one that died to be started again."""
    refused_pause: float = 0.25
    """A worker that refused gets nothing new for this long."""
    max_migrations: int = 3
    max_deaths: int = 2
    """A request aboard this many workers that died fails."""
    ejecting: Ejecting = field(default_factory=Ejecting)


@dataclass(frozen=True)
class GatewayConfig:
    """Everything but the addresses to bind."""

    max_queue: int = 1024
    max_queued_tokens: int = 4_000_000
    local_prefill_threshold: int = 16
    max_prefill_backlog: int = 32_768
    """Prompt tokens that may wait on one prefill worker before requests wait here."""
    max_buffered_events: int = 1024
    """Stream events that wait for one slow client."""
    limits: Limits = field(default_factory=Limits)
    patience: Patience = field(default_factory=Patience)
