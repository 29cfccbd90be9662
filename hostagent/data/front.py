"""A small socket beside HTTP: a thread for each who connects, a few at a time."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from abc import ABC, abstractmethod

from hostagent.errors import AgentError

log = logging.getLogger(__name__)

AT_A_TIME = 32
"""Clients; a further one is closed at once."""


_REST = 0.1  # seconds


class Front(ABC):
    """`timeout`: seconds that a client may be silent."""

    name: str

    def __init__(self, listener: socket.socket, timeout: float) -> None:
        self._listener = listener
        self._timeout = timeout
        self._room = threading.BoundedSemaphore(AT_A_TIME)
        self._stopping = threading.Event()

    @abstractmethod
    def talk(self, sock: socket.socket) -> None:
        """With one client, until that is done. What it raises of OSError and AgentError is told in the log."""

    def start(self) -> None:
        threading.Thread(target=self._accept, name=self.name, daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError as error:  # no descriptor is left for one more, perhaps
                if not self._stopping.wait(_REST):
                    log.warning("accept failed", extra={"fields": {"front": self.name, "error": str(error)}})
                continue
            if not self._room.acquire(blocking=False):
                sock.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(sock,), name=self.name, daemon=True).start()
            except RuntimeError:  # no thread to be had
                self._room.release()
                sock.close()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock:
                sock.settimeout(self._timeout)
                self.talk(sock)
        except (OSError, AgentError, RecursionError) as error:
            log.warning("a client was not served", extra={"fields": {"front": self.name, "error": str(error)}})
        finally:
            self._room.release()
