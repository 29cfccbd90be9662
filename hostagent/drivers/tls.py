"""A storage daemon's listener on TCP, for clients with TLS alone.

The agent binds the address and hands the socket over, as it does with unix sockets; the port is known before the
process runs. QEMU reads the credentials itself, as the user that it runs as (qemu(1), tls-creds-x509, tls-creds-psk and
authz-list; docs/system/tls). x509 means that a client must show a certificate of our CA. The names that may connect are
handed over as they are: QEMU 7.2 lists authz-list-file, and then does not know it.
"""

from __future__ import annotations

import errno
import json
import socket
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import JobError

CREDENTIALS, AUTHORIZATION = "tls", "authz"  # object ids inside the daemon


@dataclass(frozen=True, slots=True)
class TlsListener:
    """`port` 0 is any free one; `kind` is x509 or psk; `names` are the distinguished names that may connect, with `*`
    for anything; None is every client with a certificate of the CA."""

    host: str
    port: int
    kind: str
    folder: Path
    names: tuple[str, ...] | None = None

    def options(self) -> list[str]:
        """The objects that the listener needs."""
        verify = ",verify-peer=on" if self.kind == "x509" else ""
        where = _value(self.folder)
        found = ["--object", f"tls-creds-{self.kind},id={CREDENTIALS},dir={where},endpoint=server{verify}"]
        if self.names is not None:
            rules = [{"match": name, "policy": "allow", "format": "glob"} for name in self.names]
            authz = {"qom-type": "authz-list", "id": AUTHORIZATION, "policy": "deny", "rules": rules}
            found += ["--object", json.dumps(authz)]
        return found

    def server_options(self) -> str:
        authz = f",tls-authz={AUTHORIZATION}" if self.names is not None else ""
        return f",tls-creds={CREDENTIALS}{authz}"

    def bind(self, backlog: int) -> socket.socket:
        """A listening socket. Addresses only: nobody waits here for a name server."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
            )[0]
        except OSError as error:
            raise self._refused("cannot be bound: it is a name, and an address is needed", "invalid") from error
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.setblocking(False)
            listener.listen(backlog)
        except OSError as error:
            listener.close()
            code = _CODES.get(error.errno or 0, "unavailable")
            raise self._refused(f"cannot be bound: {error.strerror}", code) from error
        return listener

    def _refused(self, why: str, code: str) -> JobError:
        return JobError(
            code,
            f"port {self.port} of {self.host!r} {why}",
            field="tcp",
            value=f"{self.host}:{self.port}",
            remedy="say another ADDRESS:PORT of this host, or `auto` for any free port",
        )


_CODES = {errno.EADDRINUSE: "busy", errno.EADDRNOTAVAIL: "invalid", errno.EACCES: "denied"}


def _value(path: Path) -> str:
    """A path inside QEMU's comma-separated options."""
    return str(path).replace(",", ",,")
