"""The one exception tree of Tandem.

Every error that can reach a person or another process derives from `TandemError`. `tandem.service.status` maps the tree
to gRPC status codes and google.rpc details, once, and back again on the client's side.

    TandemError
    ├── InvalidRequestError        the caller's input is wrong            INVALID_ARGUMENT
    ├── UnauthenticatedError       nobody knows who calls                 UNAUTHENTICATED
    ├── PermissionDeniedError      the caller is known, but may not       PERMISSION_DENIED
    ├── NotFoundError              no such model, lease or request        NOT_FOUND
    ├── OverloadedError            a limit or a pool is full; retry       RESOURCE_EXHAUSTED
    ├── UnavailableError           no worker, or it is draining; retry    UNAVAILABLE
    │   └── DrainingError
    ├── DeadlineError              the request's time is over             DEADLINE_EXCEEDED
    ├── RequestCancelledError      the caller went away                   CANCELLED
    ├── IncompatibleError          two sides can't work together          FAILED_PRECONDITION
    │   └── StaleError             meant for an earlier life or attempt   ABORTED
    ├── DataCorruptionError        a checksum or generation differs       DATA_LOSS
    ├── ConfigError                wrong flag, file or environment        (start-up: exit code 2)
    │   └── ModelFormatError       a model file can't be read
    └── InternalError              our own bug                            INTERNAL
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class TandemError(Exception):
    """Base of all errors. `reason` is a stable UPPER_SNAKE_CASE word that programs may match on."""

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Keep the message, the stable reason (class default when None) and machine-readable metadata."""
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata: dict[str, str] = dict(metadata or {})


class InvalidRequestError(TandemError):
    """The caller's input is wrong. `field` names it as in the proto, for example `sampling.top_p`."""

    default_reason = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str = "", reason: str | None = None) -> None:
        """`message` says what was wrong and what is allowed."""
        super().__init__(message, reason=reason, metadata={"field": field} if field else None)
        self.field = field


class UnauthenticatedError(TandemError):
    """Nobody knows who calls: no key or certificate, or an unknown one."""

    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(TandemError):
    """The caller is known, but this is not for them."""

    default_reason = "PERMISSION_DENIED"


class NotFoundError(TandemError):
    """No such model, lease or request."""

    default_reason = "NOT_FOUND"


class OverloadedError(TandemError):
    """A queue, pool or limit is full. `retry_after` is in seconds; None means that a retry can't help."""

    default_reason = "OVERLOADED"

    def __init__(self, message: str, *, retry_after: float | None = 1.0, reason: str | None = None) -> None:
        """`retry_after` becomes google.rpc.RetryInfo."""
        super().__init__(message, reason=reason)
        self.retry_after = retry_after


class UnavailableError(TandemError):
    """No worker can take the request now. `retry_after` is in seconds."""

    default_reason = "UNAVAILABLE"

    def __init__(self, message: str, *, retry_after: float | None = 1.0, reason: str | None = None) -> None:
        """`retry_after` becomes google.rpc.RetryInfo."""
        super().__init__(message, reason=reason)
        self.retry_after = retry_after


class DrainingError(UnavailableError):
    """The worker is about to stop and takes nothing new."""

    default_reason = "DRAINING"


class DeadlineError(TandemError):
    """The request's deadline passed."""

    default_reason = "DEADLINE_EXCEEDED"


class RequestCancelledError(TandemError):
    """The caller went away."""

    default_reason = "CANCELLED"


class IncompatibleError(TandemError):
    """Two sides can't work together: models, layouts or transports differ."""

    default_reason = "INCOMPATIBLE"


class StaleError(IncompatibleError):
    """A message meant for an earlier incarnation or attempt."""

    default_reason = "STALE"


class DataCorruptionError(TandemError):
    """Bytes that arrived are not the bytes that were sent."""

    default_reason = "DATA_CORRUPTION"


class ConfigError(TandemError):
    """A wrong flag, file or environment. Raised at start, never while serving."""

    default_reason = "CONFIG"


class ModelFormatError(ConfigError):
    """A model file that is missing, truncated or not a model."""

    default_reason = "MODEL_FORMAT"


class InternalError(TandemError):
    """Our own bug."""

    default_reason = "INTERNAL"
