"""One line for each grant, extension and revocation, appended and never changed. No line has a ticket's id.

`digest` tells two tickets of one transfer apart, and finds the line of a ticket that one has in hand: the first 16
hexadecimal digits of the SHA-256 of its id.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from hostagent.data.tickets import Ticket

log = logging.getLogger(__name__)


class Audit:
    """`path` None: to the log alone."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()

    def tell(self, what: str, ticket: Ticket, who: str = "") -> None:
        spec = ticket.spec
        fields = {
            "transfer": spec.name,
            "digest": hashlib.sha256(spec.uuid.encode()).hexdigest()[:16],
            "ops": list(spec.ops),
            "size": spec.size,
            "backend": urlsplit(spec.url).scheme,
            "by": who,
        }
        log.info("ticket %s", what, extra={"fields": fields})
        if self._path is None:
            return
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": what, **fields})
        try:
            with self._lock:
                fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
                try:
                    os.write(fd, line.encode() + b"\n")
                finally:
                    os.close(fd)
        except OSError as error:
            log.error("the audit cannot be written", extra={"fields": {"path": str(self._path), "error": str(error)}})
