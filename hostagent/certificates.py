"""A server's certificate, read anew when its files change; and who a client must be.

What cannot be used leaves what is in force as it is, and is told: files that are no certificate, a key of another one,
a certificate whose time is over.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from hostagent import x509
from hostagent.errors import AgentError

log = logging.getLogger(__name__)

_LOOK = 1.0  # seconds between two looks at the files
_LARGEST_FILE = 16 << 20  # bytes of a file of authorities; all that browsers trust take 250 KiB


class InForce(NamedTuple):
    """`authorities` tells those that clients are judged by from others."""

    context: ssl.SSLContext
    authorities: str


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files. `client_ca`: clients must show a certificate that one of these signed, or may (`optional`). `setting`
    and `ca_setting` are the names of what was wrong, when something is."""

    cert: Path
    key: Path
    client_ca: Path | None = None
    optional: bool = False
    setting: str = "data.cert"
    ca_setting: str = "data.client_ca"

    def load(self) -> InForce:
        """TLS 1.2 at least. AgentError invalid, naming the file."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            message = f"the certificate {str(self.cert)!r} or its key {str(self.key)!r} cannot be used: {error}"
            remedy = "PEM files, readable by the daemon"
            raise AgentError("invalid", message, field=self.setting, remedy=remedy) from error
        if self.client_ca is None:
            return InForce(context, "")
        try:
            with self.client_ca.open("rb") as file:
                text = file.read(_LARGEST_FILE)
            context.load_verify_locations(cadata=text.decode("ascii", "replace"))
        except (OSError, ValueError) as error:
            message = f"the authorities in {str(self.client_ca)!r} cannot be used: {error}"
            raise AgentError("invalid", message, field=self.ca_setting, remedy="a PEM file") from error
        context.verify_mode = ssl.CERT_OPTIONAL if self.optional else ssl.CERT_REQUIRED
        return InForce(context, hashlib.sha256(text).hexdigest())

    def ends(self) -> datetime | None:
        """When it ceases to hold; None where that cannot be read, which then is no reason for anything."""
        try:
            return x509.validity(self.cert).ends
        except (OSError, ValueError):
            return None


def _no_password() -> str:
    """Nobody is there to be asked, and OpenSSL would ask on the terminal."""
    raise ValueError("the key has a password: one without it is needed")


class Renewing:
    """The context for the next connection. New files that cannot be used leave the old ones in force, and are told."""

    def __init__(self, certificate: Certificate) -> None:
        self._certificate = certificate
        self._lock = threading.Lock()
        self._seen = self._stamps()
        self._in_force = certificate.load()
        self._looked = time.monotonic()
        if _over(ends := certificate.ends()):
            fields = {"cert": str(certificate.cert), "ended": str(ends)}
            log.error("the certificate's time is over: clients will refuse it", extra={"fields": fields})

    def __call__(self) -> ssl.SSLContext:
        with self._lock:
            if time.monotonic() - self._looked > _LOOK:
                self._looked = time.monotonic()
                self._look()
            return self._in_force.context

    @property
    def in_force(self) -> InForce:
        """Without a look at the files."""
        return self._in_force

    def look(self) -> None:
        """For who has a rhythm of its own, and a thread for it."""
        with self._lock:
            self._look()

    def reload(self) -> None:
        with self._lock:
            self._look(anyway=True)

    def _look(self, *, anyway: bool = False) -> None:
        stamps = self._stamps()
        if stamps == self._seen and not anyway:
            return
        try:
            loaded = self._certificate.load()
            if _over(ends := self._certificate.ends()):
                message = f"the certificate's time was over at {ends}"
                raise AgentError("invalid", message, field=self._certificate.setting)
        except AgentError as error:
            log.error("the old certificate stays in force", extra={"fields": {"error": error.message}})
        else:
            self._in_force = loaded
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


def _over(ends: datetime | None) -> bool:
    return ends is not None and ends <= datetime.now(UTC)
