"""The daemon's certificate, read anew when its files change; and who a client must be."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from hostagent.errors import AgentError

log = logging.getLogger(__name__)

_LOOK = 1.0  # seconds between two looks at the files


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files. `client_ca`: clients must show a certificate that one of these signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 at least. AgentError invalid, naming the file."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        try:
            context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            message = f"the certificate {str(self.cert)!r} or its key {str(self.key)!r} cannot be used: {error}"
            raise AgentError(
                "invalid", message, field="data.cert", remedy="PEM files, readable by the daemon"
            ) from error
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ssl.SSLError) as error:
                message = f"the authorities in {str(self.client_ca)!r} cannot be used: {error}"
                raise AgentError("invalid", message, field="data.client_ca", remedy="a PEM file") from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context


class Renewing:
    """The context for the next connection. New files that cannot be used leave the old ones in force, and are told."""

    def __init__(self, certificate: Certificate) -> None:
        self._certificate = certificate
        self._lock = threading.Lock()
        self._seen = self._stamps()
        self._context = certificate.context()
        self._looked = time.monotonic()

    def __call__(self) -> ssl.SSLContext:
        with self._lock:
            if time.monotonic() - self._looked > _LOOK:
                self._looked = time.monotonic()
                self._look()
            return self._context

    def reload(self) -> None:
        with self._lock:
            self._look(anyway=True)

    def _look(self, *, anyway: bool = False) -> None:
        stamps = self._stamps()
        if stamps == self._seen and not anyway:
            return
        try:
            self._context = self._certificate.context()
        except AgentError as error:
            log.error("the old certificate stays in force", extra={"fields": {"error": error.message}})
        else:
            log.info("certificate read anew", extra={"fields": {"cert": str(self._certificate.cert)}})
        self._seen = stamps

    def _stamps(self) -> list[tuple[int, int]]:
        found = []
        for path in (self._certificate.cert, self._certificate.key, self._certificate.client_ca):
            try:
                status = path.stat() if path else None
            except OSError:
                status = None
            found.append((status.st_mtime_ns, status.st_ino) if status else (0, 0))
        return found
