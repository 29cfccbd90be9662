"""What an NBD server offers under an export's name, asked without using the export.

The question ends in the handshake (NBD_OPT_INFO, NBD_OPT_ABORT): a server that serves one client and then ends, as
qemu-nbd does by default, still waits for him afterwards. Blocking, for a worker thread; all of it within one deadline.
"""

from __future__ import annotations

import errno
import importlib
import select
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hostagent.errors import AgentError

nbd: Any
try:
    nbd = importlib.import_module("nbd")
except ImportError:  # python3-libnbd is a distribution package
    nbd = None

TICK_MS = 50
_UNKNOWN = (errno.ENOTSUP, errno.EINVAL)
"""NBD_REP_ERR_UNSUP and its like, as libnbd says them."""


@dataclass(frozen=True, slots=True)
class Offer:
    """`size` in bytes."""

    size: int
    read_only: bool


def ask(server: Mapping[str, Any], export: str, timeout: float) -> Offer | None:
    """`server` is QEMU's SocketAddress (unix or inet). None when the server does not answer such questions.

    AgentError: `timeout` after so many seconds, `not_found` without such an export, `unavailable` for all else.
    """
    if nbd is None:
        raise AgentError("unavailable", "the libnbd binding is not installed", remedy="apt install python3-libnbd")
    handle: Any = nbd.NBD()
    try:
        return _ask(handle, server, export, timeout)
    except nbd.Error as error:
        text = error.string.partition(": ")[2] if error.string.startswith("nbd_") else error.string
        failure = AgentError("unavailable", text)
    except AgentError as error:
        failure = error.with_traceback(None)
    finally:
        handle = None  # libnbd closes with the last reference, of which a traceback would have one
    raise failure


def _ask(handle: Any, server: Mapping[str, Any], export: str, timeout: float) -> Offer | None:
    deadline = time.monotonic() + timeout
    handle.set_opt_mode(True)
    handle.set_export_name(export)
    if server["type"] == "unix":
        handle.aio_connect_unix(server["path"])
    else:
        handle.aio_connect_tcp(server["host"], server["port"])
    answers: list[int] = []

    def answered(error: Any) -> int:
        answers.append(int(error.value))
        return 1  # it is not called again

    def until(done: Callable[[], bool]) -> None:
        while not done():
            if time.monotonic() > deadline:
                raise AgentError("timeout", f"the server did not answer within {timeout:g} s")
            _serve(handle)

    until(lambda: bool(handle.aio_is_negotiating() or handle.aio_is_ready()))
    if handle.aio_is_ready():  # an old server, which has no handshake to stay in
        return _offer(handle)
    handle.aio_opt_info(answered)
    until(lambda: bool(answers))
    offer = _offer(handle) if answers[0] == 0 else None
    with suppress(nbd.Error):
        handle.aio_opt_abort()
        until(lambda: bool(handle.aio_is_closed()))
    if answers[0] == errno.ENOENT:
        raise AgentError("not_found", f"the server has no export {export!r}")
    if answers[0] not in (0, *_UNKNOWN):
        raise AgentError("unavailable", f"the server refuses export {export!r}: {errno.errorcode.get(answers[0])}")
    return offer


def _offer(handle: Any) -> Offer:
    return Offer(int(handle.get_size()), bool(handle.is_read_only()))


def _serve(handle: Any) -> None:
    """Wait a moment for the socket, and do what it is ready for. Here and not in libnbd, which would keep the
    interpreter from other threads meanwhile."""
    direction = handle.aio_get_direction()
    reads, writes = direction & nbd.AIO_DIRECTION_READ, direction & nbd.AIO_DIRECTION_WRITE
    poll = select.poll()
    poll.register(handle.aio_get_fd(), (select.POLLIN if reads else 0) | (select.POLLOUT if writes else 0))
    for _, event in poll.poll(TICK_MS):
        if reads and event & (select.POLLIN | select.POLLHUP | select.POLLERR):
            handle.aio_notify_read()
        elif writes and event & (select.POLLOUT | select.POLLHUP | select.POLLERR):
            handle.aio_notify_write()
