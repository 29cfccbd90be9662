"""What systemd is told (sd_notify(3)): READY=1 once requests are answered, RELOADING=1, STOPPING=1, and a STATUS line.
Silent without systemd."""

from __future__ import annotations

import os
import socket
import time


def notify(*states: str) -> bool:
    """Send `states` ("READY=1", "STATUS=…") to NOTIFY_SOCKET. False when there is none, or nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address[0] == "@":  # an abstract socket, which systemd writes with an @ for the NUL
        address = "\0" + address[1:]
    message = "\n".join(state.replace("\n", " ") for state in states)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
        try:
            sender.sendto(message.encode(errors="replace"), address)
        except OSError:  # the agent's work does not depend on who watches it
            return False
    return True


def ready(status: str = "ready") -> bool:
    return notify("READY=1", f"STATUS={status}")


def reloading() -> bool:
    """READY=1 ends it."""
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping(seconds: float) -> bool:
    """It may take so long."""
    return notify("STOPPING=1", "STATUS=stopping", f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")


def status(text: str) -> bool:
    return notify(f"STATUS={text}")
