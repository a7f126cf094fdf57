"""What several commands share: the gateway's address and how a failed call reads to a person."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from tandem.errors import ConfigError, TandemError, UnauthenticatedError, UnavailableError
from tandem.service.address import parse
from tandem.service.files import read_bounded

DEFAULT_GATEWAY = "127.0.0.1:50051"
DEFAULT_HTTP = "127.0.0.1:50080"
MAX_KEY_BYTES = 4096

F = TypeVar("F", bound=Callable[..., Any])


def gateways_option(function: F) -> F:
    """--gateway HOST:PORT[,HOST:PORT...], for commands that go on at another gateway when one is lost."""
    return click.option(
        "--gateway",
        "gateways",
        metavar="HOST:PORT[,...]",
        default=DEFAULT_GATEWAY,
        show_default=True,
        envvar="TANDEM_GATEWAY",
        callback=_all_checked,
        help="The gateway to talk to; of several, the next when one is lost.",
    )(function)


def access_options(function: F) -> F:
    """--tls-ca, --tls-cert, --tls-key, --tls-server-name and --api-key-file, for `Access`."""
    files = {
        "--tls-ca": "PEM: authorities of the gateway's certificate; means TLS.",
        "--tls-cert": "PEM: your own certificate, where the gateway asks for one.",
        "--tls-key": "PEM: its private key.",
        "--api-key-file": "File with your API key.  [default: the key in $TANDEM_API_KEY, if any]",
    }
    for flag, text in reversed(files.items()):
        variable = "TANDEM_" + flag.removeprefix("--").replace("-", "_").upper()
        function = click.option(flag, metavar="FILE", envvar=variable, help=text)(function)
    name = click.option(
        "--tls-server-name",
        metavar="NAME",
        default="",
        envvar="TANDEM_TLS_SERVER_NAME",
        help="The name in the gateway's certificate.  [default: the host of --gateway]",
    )
    return name(function)


def take_access(flags: dict[str, Any]) -> dict[str, Any]:
    """Takes the values of `access_options` out of `flags`, as keywords of a client. Raises ConfigError."""
    path = flags.pop("api_key_file")
    tls = {name: flags.pop(name) for name in ("tls_ca", "tls_cert", "tls_key", "tls_server_name")}
    return {**tls, "api_key": api_key(path)}


def api_key(path: str | None) -> str | None:
    """The key in a file, else in $TANDEM_API_KEY, else None: never on the command line, which everybody can read."""
    if path is None:
        return os.environ.get("TANDEM_API_KEY") or None
    try:
        return read_bounded(Path(path), "--api-key-file", MAX_KEY_BYTES).decode("ascii").strip()
    except UnicodeDecodeError:
        raise ConfigError(f"--api-key-file: {path} holds no key: a key is printable ASCII without spaces") from None


def _checked(_context: click.Context, _option: click.Parameter, text: str) -> str:
    if "/" not in text:  # gRPC's own targets, such as dns:///NAME:PORT, are its own business
        parse(text, flag="--gateway")
    return text


def _all_checked(context: click.Context, option: click.Parameter, text: str) -> list[str]:
    return [_checked(context, option, one.strip()) for one in text.split(",")]


def gateway_ports(gateways: Sequence[str]) -> list[int]:
    """Of addresses HOST:PORT. Raises ConfigError naming the flag."""
    return [parse(gateway, flag="--gateway").port for gateway in gateways]


def _unreachable(gateway: str, message: str) -> str:
    """What gRPC says of a connection that it couldn't make, and what to do."""
    cause = message.rpartition("last error:")[2]
    if "verif" in cause.lower() or "certificate" in cause.lower():
        return f"the gateway at {gateway} isn't the one that --tls-ca and --tls-server-name describe:{cause}"
    if "closed" in cause or "reset" in cause or "handshake" in cause.lower():
        return f"the gateway at {gateway} ends the connection: does it speak TLS (--tls-ca), does it want --tls-cert?"
    return f"no gateway answers at {gateway}: start one with `tandem up`, or name another with --gateway HOST:PORT"


@contextmanager
def explained(gateway: str) -> Iterator[None]:
    """Says what to do when no gateway answers; names the field of a refused request."""
    try:
        yield
    except UnavailableError as exc:
        if "failed to connect" in exc.message.lower():
            raise UnavailableError(_unreachable(gateway, exc.message)) from exc
        raise
    except UnauthenticatedError as exc:
        hint = "give --api-key-file FILE or set TANDEM_API_KEY"
        raise UnauthenticatedError(f"{exc.message}: {hint}", reason=exc.reason) from exc
    except TandemError as exc:
        field = exc.metadata.get("field")
        if field and field not in exc.message:
            raise TandemError(f"{field}: {exc.message}", reason=exc.reason) from exc
        raise
