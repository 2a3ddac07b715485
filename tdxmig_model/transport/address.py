"""Addresses as text: where a connection goes, or which file holds a stream."""

from __future__ import annotations

from dataclasses import dataclass

from tdxmig_model.errors import UsageError


@dataclass(frozen=True, slots=True)
class Address:
    """``tcp:HOST:PORT`` (an IPv6 host in brackets), ``unix:PATH`` or ``file:PATH``."""

    kind: str
    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address.  UsageError says what is wrong with it."""
        kind, _, rest = text.partition(":")
        if kind in ("unix", "file"):
            if not rest or "\0" in rest:
                raise UsageError(f"address {text!r}: a path is missing, write {kind}:PATH")
            return cls(kind, path=rest)
        if kind != "tcp":
            raise UsageError(f"address {text!r}: write tcp:HOST:PORT, unix:PATH or file:PATH")
        host, colon, port = rest.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise UsageError(f"address {text!r}: put an IPv6 host in brackets, tcp:[::1]:PORT")
        if not colon or not host:
            raise UsageError(f"address {text!r}: a host is missing, write tcp:HOST:PORT")
        if not (port.isascii() and port.isdigit() and int(port) <= 0xFFFF):
            raise UsageError(f"address {text!r}: port {port!r} is not a number from 0 to 65535")
        return cls("tcp", host=host, port=int(port))

    def __str__(self) -> str:
        if self.kind != "tcp":
            return f"{self.kind}:{self.path}"
        return (
            f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
        )
