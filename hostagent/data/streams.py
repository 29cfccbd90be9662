"""The two ends of a transfer, as a backend sees them.

A backend neither knows HTTP nor TLS, nor who is at the other end: it fills a Sink or empties a Source. These do what
every byte needs, whatever it came from: they wait for a slow peer for as long as it makes progress, keep below the
bandwidth that is allowed, count, and raise Stopped once the ticket was revoked. So a backend moves bytes in pieces of
`PIECE` at most, between which they can do that.
"""

from __future__ import annotations

from typing import Protocol

from hostagent.errors import AgentError

PIECE = 1 << 20
"""Bytes of one piece. Measured: 512 KiB to 2 MiB is the plateau, 8 MiB costs caches (docs/data.md)."""


class Stopped(Exception):
    """The transfer may not go on: its ticket was revoked, replaced or has expired, or the daemon is stopping."""


class PeerGone(Exception):
    """The client has closed its end, or made no progress for as long as it may."""


def unreadable(error: OSError) -> AgentError:
    """What the kernel says of an image's file, in the middle of a download."""
    return AgentError("io_error", f"the image cannot be read: {error.strerror}", remedy="look at its storage (dmesg)")


class Sink(Protocol):
    """Where a download's bytes go, in order."""

    def write(self, data: memoryview | bytes | bytearray) -> None:
        """All of `data`; the buffer is the caller's again when this returns. Raises Stopped, PeerGone."""

    def send_file(self, fd: int, offset: int, length: int) -> None:
        """`length` bytes of a file from `offset` on, without copying them where that can be done (sendfile(2)).

        Raises Stopped, PeerGone, and AgentError `image_changed` when the file ends before."""


class Source(Protocol):
    """Where an upload's bytes come from, in order."""

    def read_into(self, buffer: memoryview) -> int:
        """Fill `buffer`; less only at the end of the body, where it is 0 from then on. Raises Stopped, PeerGone (also
        for a body that ends early)."""
