"""What systemd is told: READY=1 once requests are answered, STOPPING=1, and a STATUS line. Silent without systemd."""

from __future__ import annotations

import os
import socket


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


def stopping(status: str = "stopping") -> bool:
    return notify("STOPPING=1", f"STATUS={status}")


def status(text: str) -> bool:
    return notify(f"STATUS={text}")
