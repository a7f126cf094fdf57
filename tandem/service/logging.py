"""Structured logs on stderr: one JSON object a line, or a readable line when stderr is a terminal.

`configure` once at start; `get_logger` anywhere; `bind_request` around the work of one request, so that each line of
that task carries its `request_id`. Threads of their own (the engine's) have no context and name the request themselves.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import structlog

from tandem.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")


def configure(role: str, level: str = "info") -> None:
    """Sends our logs and those of libraries to stderr. `role` is on every line. Raises ConfigError for an unknown
    level.
    """
    if level not in LEVELS:
        raise ConfigError(f"--log-level: {level!r} is not one of {', '.join(LEVELS)}")

    shared = _shared_processors(role)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_last_processors()],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def _shared_processors(role: str) -> list[structlog.typing.Processor]:
    """What our lines and those of libraries go through alike."""

    def add_role(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event.setdefault("role", role)
        return event

    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        add_role,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]


def _last_processors() -> list[structlog.typing.Processor]:
    """The console renderer formats exceptions itself; JSON takes them as one string, without local variables."""
    if sys.stderr.isatty():
        return [structlog.dev.ConsoleRenderer(colors=True, exception_formatter=structlog.dev.plain_traceback)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry `logger: name`. May be made at import time, before `configure`."""
    return cast(structlog.typing.FilteringBoundLogger, structlog.get_logger(name))


@contextmanager
def bind_request(request_id: str, tenant: str = "") -> Iterator[None]:
    """Puts `request_id`, and the tenant if there is one, on every line that this task (and tasks it starts) logs
    inside.
    """
    facts = {"request_id": request_id, **({"tenant": tenant} if tenant else {})}
    with structlog.contextvars.bound_contextvars(**facts):
        yield
