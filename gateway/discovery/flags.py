"""Flags that say where workers are, and the one source that they name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from gateway.discovery.dns import INTERVAL_SECONDS, DnsWorkers, Pace
from gateway.discovery.endpoint_slices import EndpointSlices, Selection, selector_of
from gateway.discovery.file import WorkersFile
from gateway.discovery.kubernetes import CREDENTIALS, Api
from gateway.discovery.listed import ListedWorkers
from gateway.discovery.source import Role, Source
from tandem.errors import ConfigError
from tandem.service import address as addresses

WAYS = "--workers-file, --workers-dns, --workers-endpointslices, or --prefill-worker and --decode-worker"


def add_discovery_flags(flags: argparse.ArgumentParser) -> None:
    """Adds them to the gateway's."""
    add = flags.add_argument_group("workers", f"One of {WAYS}.").add_argument
    add("--prefill-worker", action="append", default=[], metavar="HOST:PORT", help="may be repeated")
    add("--decode-worker", action="append", default=[], metavar="HOST:PORT", help="may be repeated")
    add("--workers-file", type=Path, help='JSON {"prefill": [...], "decode": [...]}, watched for changes')
    add(
        "--workers-dns",
        action="append",
        default=[],
        metavar="ROLE=NAME:PORT",
        help="all addresses of a name, such as a headless Service's, resolved again and again; once a role",
    )
    add("--workers-dns-interval", type=_interval, default=INTERVAL_SECONDS, metavar="SECONDS", help="between lookups")
    add(
        "--workers-endpointslices",
        action="append",
        default=[],
        metavar="ROLE=SELECTOR",
        help="ready pods of Kubernetes Services, by a label selector of their EndpointSlices or a Service's name; "
        "once a role",
    )
    add("--kubernetes-namespace", default="", metavar="NAME", help="of those Services; default: the pod's own")
    add("--kubernetes-port", default="grpc", metavar="NAME", help="name of their port; default: grpc, or the only one")
    add("--kubernetes-api", default="", metavar="URL", help="of the API server; default: as the pod's environment says")
    add(
        "--kubernetes-credentials",
        type=Path,
        default=CREDENTIALS,
        metavar="FOLDER",
        help="with token, ca.crt and namespace; default: the pod's service account",
    )


def _interval(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds from 0.1 to 3600")
    return value


def source_of(flags: argparse.Namespace) -> Source:
    """What the flags name. Raises ConfigError for none, for several, and for what can't work."""
    listed = [*flags.prefill_worker, *flags.decode_worker]
    given = [flags.workers_file, listed, flags.workers_dns, flags.workers_endpointslices]
    if sum(map(bool, given)) > 1:
        raise ConfigError(f"--decode-worker: give one of {WAYS}")
    if flags.workers_file:
        return WorkersFile(flags.workers_file)
    if flags.workers_dns:
        names = by_role("--workers-dns", flags.workers_dns)
        parsed = {role: addresses.parse(name, flag="--workers-dns") for role, name in names.items()}
        return DnsWorkers(parsed, Pace(interval=flags.workers_dns_interval))
    if flags.workers_endpointslices:
        return _slices(flags)
    if not flags.decode_worker:
        raise ConfigError(f"--decode-worker: at least one is needed, or another of {WAYS}")
    return ListedWorkers(flags.prefill_worker, flags.decode_worker)


def _slices(flags: argparse.Namespace) -> EndpointSlices:
    selectors = by_role("--workers-endpointslices", flags.workers_endpointslices)
    api = Api.find(flags.kubernetes_api, flags.kubernetes_credentials)
    namespace = flags.kubernetes_namespace or api.namespace()
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", namespace):
        raise ConfigError(f"--kubernetes-namespace: {namespace!r} is no namespace's name")
    chosen = {role: selector_of(text) for role, text in selectors.items()}
    return EndpointSlices(api, Selection(namespace, chosen, flags.kubernetes_port))


def by_role(flag: str, texts: Sequence[str]) -> dict[Role, str]:
    """ROLE=REST, once a role, decode at least. Raises ConfigError."""
    found: dict[Role, str] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        role: Role | None = "prefill" if name == "prefill" else "decode" if name == "decode" else None
        if role is None or not equals or not rest.strip():
            raise ConfigError(f"{flag}: {text!r} does not begin with prefill= or decode=")
        if role in found:
            raise ConfigError(f"{flag}: {role} is given twice")
        found[role] = rest.strip()
    if "decode" not in found:
        raise ConfigError(f"{flag}: decode is missing")
    return found
