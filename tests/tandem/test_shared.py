"""Addresses, logs, metrics, models: what every process shares."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tandem import models
from tandem.errors import ConfigError, ModelFormatError
from tandem.service import address, channel, logging, metrics


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("127.0.0.1:0", "127.0.0.1", 0), ("[::1]:65535", "::1", 65535), (" localhost:8080 ", "localhost", 8080)],
)
def test_address_round_trip(text: str, host: str, port: int) -> None:
    """str() gives back what was parsed."""
    parsed = address.parse(text)
    assert (parsed.host, parsed.port) == (host, port)
    assert str(parsed) == text.strip()


@pytest.mark.parametrize(
    "text", ["", "host", ":80", "host:", "host:x", "host:65536", "::1:80", "http://h:80", "a b:80", "h:-1", "h:٣"]
)
def test_address_refusals_name_the_flag(text: str) -> None:
    """Whatever isn't HOST:PORT."""
    with pytest.raises(ConfigError, match="--listen"):
        address.parse(text, flag="--listen")


def test_loopback() -> None:
    """Decides about proxies and warnings."""
    assert [address.Address(h, 1).is_loopback for h in ("127.0.0.9", "::1", "localhost", "10.0.0.1", "host")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_channel_options() -> None:
    """No retries by gRPC; a proxy only for hosts that aren't this one; bulk has its own connection."""
    plain = dict(channel.channel_options("127.0.0.1:1"))
    assert plain["grpc.enable_retries"] == 0
    assert plain["grpc.enable_http_proxy"] == 0
    assert dict(channel.channel_options("dns:///host:1"))["grpc.enable_http_proxy"] == 1
    assert dict(channel.channel_options("h:1", for_bulk=True))["grpc.use_local_subchannel_pool"] == 1


LOGGING = """
import logging as std, sys
from tandem.service import logging
logging.configure("decode", "info")
log = logging.get_logger("room.module")
with logging.bind_request("r-1", "alice"):
    log.info("inside", tokens=3)
log.debug("hidden")
try:
    secret = 42
    raise ValueError("boom")
except ValueError:
    log.exception("outside")
std.getLogger("library").warning("theirs %d", 7)
"""


def test_logs_are_json_lines_with_request_ids() -> None:
    """Ours and libraries', on stderr alone; tracebacks without local variables."""
    done = subprocess.run([sys.executable, "-c", LOGGING], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    inside, outside, theirs = map(json.loads, done.stderr.splitlines())
    assert (inside["request_id"], inside["tenant"]) == ("r-1", "alice")
    assert (inside["event"], inside["tokens"], inside["role"], inside["level"]) == ("inside", 3, "decode", "info")
    assert inside["logger"] == "room.module"
    assert "request_id" not in outside
    assert "ValueError: boom" in outside["exception"]
    assert "42" not in outside["exception"].replace("secret = 42", "")
    assert (theirs["event"], theirs["level"], theirs["role"]) == ("theirs 7", "warning", "decode")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_logs_on_a_full_disk() -> None:
    """Lines are lost; whoever logs goes on, and ends well."""
    with open("/dev/full", "w") as full:
        code = LOGGING + "print('went on')\n"
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, text=True)
    assert (done.stdout, done.returncode) == ("went on\n", 0)


def test_what_up_says_on_a_full_disk() -> None:
    """Is lost; it goes on serving."""
    code = "from tandem.cli.terminal import say, tell; say('ready'); tell('x'); import sys; sys.exit(7)"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full)
    assert done.returncode == 7


def test_unknown_log_level() -> None:
    """Named with what is allowed."""
    with pytest.raises(ConfigError, match=r"--log-level.*warning"):
        logging.configure("x", "loud")


def test_metrics_over_http() -> None:
    """The field's names, with our prefix and a role."""
    measured = metrics.Metrics("decode")
    measured.num_requests_running.set(3)
    measured.prompt_tokens.inc(5)
    measured.request_success.inc(finished_reason="length")
    measured.iteration_tokens_total.observe(7)
    measured.gauge("extra", "A room's own.").set(1)
    bound = metrics.start_metrics_server("127.0.0.1:0", measured.registry)
    with urllib.request.urlopen(f"http://{bound}/metrics", timeout=10) as response:
        text = response.read().decode()
    for line in (
        'tandem_num_requests_running{role="decode"} 3.0',
        'tandem_prompt_tokens_total{role="decode"} 5.0',
        'tandem_request_success_total{finished_reason="length",role="decode"} 1.0',
        'tandem_iteration_tokens_total_sum{role="decode"} 7.0',
        'tandem_extra{role="decode"} 1.0',
        "process_resident_memory_bytes",
    ):
        assert line in text
    with pytest.raises(ConfigError, match="--metrics: can't listen"):
        metrics.start_metrics_server(bound, measured.registry)


FIELD_NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens",
    "generation_tokens",
    "prompt_tokens_cached",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "iteration_tokens_total",
    "nixl_xfer_time_seconds",
    "nixl_bytes_transferred",
    "nixl_num_failed_transfers",
    "nixl_num_kv_expired_reqs",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
]


def test_every_name_of_the_field_is_there() -> None:
    """As attribute and as metric."""
    measured = metrics.Metrics("prefill")
    names = {family.name for family in measured.registry.collect()}
    for name in FIELD_NAMES:
        assert hasattr(measured, name)
        assert f"tandem_{name}".removesuffix("_total") in {known.removesuffix("_total") for known in names}


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths, the default, and errors that say what is allowed."""
    assert models.resolve_model(str(tmp_path)) == tmp_path.resolve()
    assert models.resolve_model("default").name == models.DEFAULT_FILE
    with pytest.raises(ModelFormatError, match="hub:ORG/NAME"):
        models.resolve_model("nowhere.gguf")
    with pytest.raises(ConfigError, match="is not hub:ORG/NAME"):
        models.resolve_model("hub:justaname")
    monkeypatch.setattr(models, "DEFAULT_PACKAGE", "no_such_package_here")
    with pytest.raises(ConfigError, match="make setup"):
        models.resolve_model("default")


def test_hub_models_come_through_the_hub_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's snapshot is the model; its failure is one line."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path / name))
    assert models.resolve_model("hub:org/name") == tmp_path / "org" / "name"
    asked: list[str] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: (asked.extend(allow_patterns), tmp_path)[1]
    )
    models.resolve_model("hub:org/name", weights=False)
    assert "*.json" in asked
    assert "*.safetensors" not in asked

    def offline(name: str, **options: Any) -> str:
        raise OSError("offline\nlong tale")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"can't get org/name from the hub: offline$"):
        models.resolve_model("hub:org/name")


def test_default_model_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right file passes; another is refused."""
    assert models.verify_default().stat().st_size == 98362432
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF")
    monkeypatch.setattr(models, "default_model", lambda: wrong)
    with pytest.raises(ModelFormatError, match="SHA-256"):
        models.verify_default()


def test_transformers_does_not_take_our_kernels_for_the_hubs() -> None:
    """The name is a public package that transformers probes for, by distribution version."""
    code = "import kernels, transformers.utils.import_utils as u; print(kernels.__file__, u.is_kernels_available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
    assert "site-packages" not in done.stdout


def test_light_imports() -> None:
    """The CLI, the client and what the gateway shares never load torch or transformers."""
    code = (
        "import sys, tandem.cli.generate, tandem.cli.up, tandem.cli.doctor, tandem.service.server\n"
        "print(*(m for m in ('torch', 'transformers', 'numpy', 'gguf') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
