"""That all requests of a ticket read one image: they answer with one ETag, and a client puts their ranges together."""

from __future__ import annotations

import threading

from hostagent.errors import AgentError


class Same:
    """What was read first, for Opening.shared. Thread-safe."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._first: object = None

    def refuse_other(self, name: str, found: object) -> None:
        """AgentError image_changed unless `found`, which a change would change, is what the first one was."""
        with self._turn:
            if self._first is None:
                self._first = found
            if found == self._first:
                return
        message = f"{name} is not what this ticket read before"
        remedy = "find who writes it, then download all of it again with a new ticket"
        raise AgentError("image_changed", message, value=name, remedy=remedy)

    def close(self) -> None:
        """The ticket has ended."""
