"""What several commands share: the gateway's address and how a failed call reads to a person."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from tandem.errors import TandemError, UnavailableError
from tandem.service.address import Address, parse

DEFAULT_GATEWAY = "127.0.0.1:50051"
DEFAULT_HTTP = "127.0.0.1:50080"

F = TypeVar("F", bound=Callable[..., Any])


def gateway_option(function: F) -> F:
    """--gateway HOST:PORT."""
    return click.option(
        "--gateway",
        metavar="HOST:PORT",
        default=DEFAULT_GATEWAY,
        show_default=True,
        envvar="TANDEM_GATEWAY",
        callback=_checked,
        help="The gateway to talk to.",
    )(function)


def _checked(_context: click.Context, _option: click.Parameter, text: str) -> str:
    if "/" not in text:  # gRPC's own targets, such as dns:///NAME:PORT, are its own business
        parse(text, flag="--gateway")
    return text


def gateway_address(text: str) -> Address:
    """Raises ConfigError naming the flag."""
    return parse(text, flag="--gateway")


@contextmanager
def explained(gateway: str) -> Iterator[None]:
    """Says what to do when no gateway answers; names the field of a refused request."""
    try:
        yield
    except UnavailableError as exc:
        if "failed to connect" in exc.message.lower():
            raise UnavailableError(
                f"no gateway answers at {gateway}: start one with `tandem up`, or name another with --gateway HOST:PORT"
            ) from exc
        raise
    except TandemError as exc:
        field = exc.metadata.get("field")
        if field and field not in exc.message:
            raise TandemError(f"{field}: {exc.message}", reason=exc.reason) from exc
        raise
