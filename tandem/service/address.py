"""HOST:PORT, parsed once and the same everywhere."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address; `str()` gives HOST:PORT, with brackets around an IPv6 host. Port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        """HOST:PORT as gRPC and people write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True when no other machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def with_port(self, port: int) -> Address:
        """The same host at another port."""
        return Address(self.host, port)


def parse(text: str, *, flag: str = "address") -> Address:
    """Reads HOST:PORT or [IPV6]:PORT. Raises ConfigError that names `flag` and what is allowed."""
    host, colon, port_text = text.strip().rpartition(":")
    problem = f"{flag}: {text!r} is not HOST:PORT, for example 127.0.0.1:50051"
    if not colon or not host:
        raise ConfigError(problem)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"{flag}: an IPv6 host needs brackets, for example [::1]:50051, got {text!r}")
    if not (port_text.isascii() and port_text.isdigit()) or int(port_text) > 65535:
        raise ConfigError(f"{problem} (the port must be 0 to 65535)")
    if not host or any(c.isspace() or c == "/" for c in host):
        raise ConfigError(problem)
    return Address(host, int(port_text))
