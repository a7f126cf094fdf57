"""Prometheus metrics under the names that dashboards of the field know, prefixed `tandem_`, each with a `role` label.

One `Metrics` per process, with a registry of its own; attributes bear the metric's name. A room that needs more makes
them with `gauge`, `counter` and `histogram`.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from tandem.errors import ConfigError
from tandem.service import address as addresses

LATENCY_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
"""Seconds."""
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class FinishedCounter:
    """Counts finished requests by how they ended."""

    def __init__(self, counter: Counter, role: str) -> None:
        """`counter` has the labels role and finished_reason."""
        self._counter, self._role = counter, role

    def inc(self, amount: float = 1, *, finished_reason: str = "stop") -> None:
        """`finished_reason` is a `FinishReason` value: stop, length or cancelled."""
        self._counter.labels(self._role, finished_reason).inc(amount)


class FailedCounter:
    """Counts requests that ended with an error, by its code."""

    def __init__(self, counter: Counter, role: str) -> None:
        """`counter` has the labels role and code."""
        self._counter, self._role = counter, role

    def inc(self, amount: float = 1, *, code: str) -> None:
        """`code` is a gRPC status's name, such as UNAVAILABLE."""
        self._counter.labels(self._role, code).inc(amount)


class Metrics:
    """All metrics of one process. `role` is gateway, prefill or decode. Thread-safe, as prometheus_client is."""

    def __init__(self, role: str, registry: CollectorRegistry | None = None) -> None:
        """Registers everything in `registry`, a new one by default."""
        self.role = role
        self.registry = registry if registry is not None else CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._define_load()
        self._define_counts()
        self._define_latencies()
        self._define_transfer()

    def gauge(self, name: str, documentation: str) -> Gauge:
        """A gauge `tandem_<name>` of this role."""
        return Gauge(f"tandem_{name}", documentation, ["role"], registry=self.registry).labels(self.role)

    def counter(self, name: str, documentation: str) -> Counter:
        """A counter `tandem_<name>_total` of this role."""
        return Counter(f"tandem_{name}", documentation, ["role"], registry=self.registry).labels(self.role)

    def labelled_counter(self, name: str, documentation: str, label: str) -> Counter:
        """A counter `tandem_<name>_total` with a label beside the role: call `labels(role, value)` on it."""
        return Counter(f"tandem_{name}", documentation, ["role", label], registry=self.registry)

    def histogram(self, name: str, documentation: str, buckets: Sequence[float] = LATENCY_BUCKETS) -> Histogram:
        """A histogram `tandem_<name>` of this role."""
        return Histogram(
            f"tandem_{name}", documentation, ["role"], registry=self.registry, buckets=tuple(buckets)
        ).labels(self.role)

    def _define_load(self) -> None:
        self.num_requests_running = self.gauge("num_requests_running", "Requests that compute or stream now.")
        self.num_requests_waiting = self.gauge("num_requests_waiting", "Requests that wait for their turn.")
        self.kv_cache_usage_perc = self.gauge("kv_cache_usage_perc", "Used share of the KV blocks, 0 to 1.")

    def _define_counts(self) -> None:
        self.prompt_tokens = self.counter("prompt_tokens", "Prompt tokens of requests.")
        self.generation_tokens = self.counter("generation_tokens", "Tokens generated.")
        self.prompt_tokens_cached = self.counter("prompt_tokens_cached", "Prompt tokens found in a prefix cache.")
        self.prefix_cache_queries = self.counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self.prefix_cache_hits = self.counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self.num_preemptions = self.counter("num_preemptions", "Sequences preempted and recomputed.")
        self.request_success = FinishedCounter(
            Counter(
                "tandem_request_success",
                "Requests that ended without an error.",
                ["role", "finished_reason"],
                registry=self.registry,
            ),
            self.role,
        )
        self.request_failure = FailedCounter(
            Counter(
                "tandem_request_failure", "Requests that ended with an error.", ["role", "code"], registry=self.registry
            ),
            self.role,
        )
        self.spec_decode_num_drafts = self.counter("spec_decode_num_drafts", "Drafts of which a token was verified.")
        self.spec_decode_num_draft_tokens = self.counter("spec_decode_num_draft_tokens", "Draft tokens verified.")
        self.spec_decode_num_accepted_tokens = self.counter("spec_decode_num_accepted_tokens", "Draft tokens kept.")

    def _define_latencies(self) -> None:
        self.time_to_first_token_seconds = self.histogram("time_to_first_token_seconds", "Arrival to first token.")
        self.inter_token_latency_seconds = self.histogram("inter_token_latency_seconds", "Between tokens of a stream.")
        self.e2e_request_latency_seconds = self.histogram("e2e_request_latency_seconds", "Arrival to the end.")
        self.request_queue_time_seconds = self.histogram("request_queue_time_seconds", "Waiting before any work.")
        self.request_prefill_time_seconds = self.histogram("request_prefill_time_seconds", "Start to first token.")
        self.request_decode_time_seconds = self.histogram("request_decode_time_seconds", "First token to last.")
        self.request_prompt_tokens = self.histogram("request_prompt_tokens", "Prompt tokens a request.", _TOKENS)
        self.request_generation_tokens = self.histogram(
            "request_generation_tokens", "Generated tokens a request.", _TOKENS
        )
        self.iteration_tokens_total = self.histogram("iteration_tokens_total", "Tokens an engine step.", _STEP_TOKENS)

    def _define_transfer(self) -> None:
        """The names are NIXL's in the field; here they count KV transfers by whatever transport."""
        self.nixl_xfer_time_seconds = self.histogram("nixl_xfer_time_seconds", "Time of a KV transfer, any transport.")
        self.nixl_bytes_transferred = self.counter("nixl_bytes_transferred", "KV bytes transferred, any transport.")
        self.nixl_num_failed_transfers = self.counter("nixl_num_failed_transfers", "KV transfers that failed.")
        self.nixl_num_kv_expired_reqs = self.counter(
            "nixl_num_kv_expired_reqs", "Requests whose KV was freed before a transfer ended."
        )


def start_metrics_server(address: str, registry: CollectorRegistry) -> str:
    """Serves /metrics at HOST:PORT (port 0: any) from a daemon thread; returns the bound HOST:PORT. Raises
    ConfigError.
    """
    wanted = addresses.parse(address, flag="--metrics")
    try:
        server, _thread = start_http_server(wanted.port, addr=wanted.host, registry=registry)
    except OSError as exc:
        raise ConfigError(f"--metrics: can't listen on {wanted}: {exc.strerror or exc}") from exc
    return str(wanted.with_port(server.server_port))
