"""One worker of an upload: a reader of the local image, and a connection that writes."""

from __future__ import annotations

from hostagent.client.crew import Passed
from hostagent.client.local import Reader
from hostagent.client.options import PIECE
from hostagent.client.remote import Deliver, Remote
from hostagent.client.server import Server
from hostagent.client.throttle import Throttle
from hostagent.client.trouble import Lost

_ZEROS = memoryview(bytes(PIECE))


class Sender:
    """crew.Ends. A server that cannot flush, or ends the connection after each answer, gets each request flushed."""

    volatile = True

    def __init__(self, server: Server, remote: Remote, reader: Reader, throttle: Throttle) -> None:
        self._server = server
        self._remote = remote
        self._reader = reader
        self._throttle = throttle
        self._each = not server.features.flush

    def connect(self) -> None:
        if self._remote.closes and not self._each:
            self._each = True
            raise Lost("unreachable", f"{self._remote.address} ends connections after an answer")
        self._remote.connect()

    def move(self, begin: int, end: int, passed: Passed) -> None:
        def produce(deliver: Deliver) -> None:
            self._reader.read(begin, end, lambda view: self._deliver(view, deliver, passed))

        self._remote.put(begin, end - begin, produce, flush=self._each)

    def _deliver(self, view: memoryview, deliver: Deliver, passed: Passed) -> None:
        for at in range(0, len(view), self._throttle.step):
            part = view[at : at + self._throttle.step]
            self._throttle.take(len(part))
            passed(0)
            deliver(part)
            passed(len(part))

    def zero(self, begin: int, end: int) -> None:
        if self._server.features.zero:
            patience = self._server.dial.patience
            self._remote.zero(begin, end - begin, flush=self._each, timeout=patience.flush)
            return

        def produce(deliver: Deliver) -> None:
            for at in range(begin, end, PIECE):
                deliver(_ZEROS[: end - at])

        self._remote.put(begin, end - begin, produce, flush=self._each)

    def flush(self) -> None:
        if not self._each:
            self._remote.flush(self._server.dial.patience.flush)

    def abort(self) -> None:
        self._remote.abort()

    def close(self) -> None:
        self._remote.close()
        self._reader.close()
