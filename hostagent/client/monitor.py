"""A storage daemon's monitor (QMP), for one thread that asks one thing after the other."""

from __future__ import annotations

import json
import socket
from typing import Any

from hostagent.errors import AgentError

_LINE_MOST = 16 << 20  # bytes of one answer


class Monitor:
    """Over a connected socket, which it takes over. Events are passed over."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self._sock = sock
        self._timeout = timeout
        self._lines = sock.makefile("rb")

    def greet(self, timeout: float) -> None:
        self._sock.settimeout(timeout)
        self._read()
        self._sock.settimeout(self._timeout)
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """The command's answer; AgentError when it is refused, or the daemon does not answer."""
        message = {"execute": command, "arguments": {name.replace("_", "-"): v for name, v in arguments.items()}}
        try:
            self._sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise _gone(error) from error
        while True:
            answer = self._read()
            if "error" in answer:
                raise _refused(str(answer["error"].get("desc", "")))
            if "return" in answer:
                return answer["return"]

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.readline(_LINE_MOST)
            found = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError) as error:
            raise _gone(error) from error
        if not isinstance(found, dict):
            raise AgentError("storage_daemon_died", "the storage daemon for the local image ended")
        return found

    def close(self) -> None:
        self._lines.close()
        self._sock.close()


def _gone(error: Exception) -> AgentError:
    if isinstance(error, TimeoutError):
        return AgentError("timeout", "the storage daemon for the local image does not answer")
    return AgentError("storage_daemon_died", f"the storage daemon for the local image ended: {error}")


def _refused(said: str) -> AgentError:
    if "lock" in said:
        return AgentError("busy", f"the local image is in use: {said}", remedy="shut the guest down, then try again")
    if "Permission denied" in said:
        return AgentError("denied", f"the storage daemon's user may not open the local image: {said}")
    return AgentError("image_invalid", f"the local image cannot be used: {said}")
