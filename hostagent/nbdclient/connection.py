"""An NBD connection whose every wait ends: the one way in which the agent and its data daemon speak NBD.

libnbd keeps the protocol, and its poll(2) lets other threads have the interpreter. Blocking, for a worker thread: it
waits for as long as the server makes progress, and until a Fence is closed (docs: libnbd(3)).
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hostagent.errors import AgentError
from hostagent.nbdclient.dial import Fence, Fenced, Server, Waits, dial

nbd: Any
try:
    nbd = importlib.import_module("nbd")
except ImportError:  # python3-libnbd is a distribution package; without it there are no exports, pulls in increments …
    nbd = None

ALLOCATION, DEPTH, BITMAP = "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:"
ZERO = 2  # NBD_STATE_ZERO in base:allocation
DIRTY = 1  # NBD_STATE_DIRTY in qemu:dirty-bitmap
STATUS_SPAN = 1 << 30
"""Bytes that one block status request asks about."""
CONTEXTS_MOST = 64
"""Contexts of an export that are told apart; QEMU has room for fewer bitmaps than that anyway."""
_LOST = (errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED)
_DENIED = (errno.EPERM, errno.EACCES, errno.EROFS)


def available() -> bool:
    return nbd is not None


class Connection:
    """A handshake up to the choice of contexts; `go` ends it, and then there is an export.

    All raise AgentError (no_space, io_error, unavailable, timeout, denied, not_found), and Fenced once the fence is
    closed. Requests are told apart by the cookie that issuing them returns; their buffers are the caller's again when
    they are `completed`, in whatever order that is.
    """

    def __init__(self, server: Server, waits: Waits, fence: Fence | None = None) -> None:
        if nbd is None:
            raise AgentError("unavailable", "the libnbd binding is not installed", remedy="apt install python3-libnbd")
        self._server = server
        self._waits = waits
        self._fence = fence or Fence()
        self._contexts: tuple[str, ...] = ()
        self.handle: Any = nbd.NBD()
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent. Requests that are under way are given up, and may still be done."""
        if self.handle is None:
            return
        with contextlib.suppress(nbd.Error):
            if self.handle.aio_is_ready():
                self.handle.aio_disconnect(0)
        self.handle = None  # libnbd closes with the last reference
        self._fence.hold(None)

    # Handshake

    def bitmaps(self) -> tuple[str, ...]:
        """The contexts of the export's dirty bitmaps; for before `go`."""
        if not self.handle.aio_is_negotiating() or not self.handle.get_structured_replies_negotiated():
            return ()
        found: list[str] = []
        ended: list[int] = []

        def context(name: str) -> int:
            if name.startswith(BITMAP) and len(found) < CONTEXTS_MOST:
                found.append(name)
            return 0

        self.handle.add_meta_context(BITMAP)
        self._call(self.handle.aio_opt_list_meta_context, context, _noting(ended))
        self._negotiate(lambda: bool(ended))
        self.handle.clear_meta_contexts()
        return tuple(found)

    def go(self, contexts: Sequence[str] = ()) -> None:
        """Enter the transmission phase, with those of the contexts that the export has."""
        for context in contexts:
            self._call(self.handle.add_meta_context, context)
        if self.handle.aio_is_negotiating():
            ended: list[int] = []
            self._call(self.handle.aio_opt_go, _noting(ended))
            self._negotiate(lambda: bool(ended))
            if ended[0]:
                raise self._error(nbd.Error("the server refused the export", ended[0]))
        self._contexts = tuple(context for context in contexts if self.handle.can_meta_context(context))

    @property
    def contexts(self) -> tuple[str, ...]:
        """Those that the export has, in the order in which they were asked for."""
        return self._contexts

    @property
    def closed(self) -> bool:
        return self.handle is None or bool(self.handle.aio_is_closed() or self.handle.aio_is_dead())

    # Waiting

    def until(self, done: Callable[[], bool], seconds: float | None = None, setting: str = "") -> None:
        """Serve the connection until `done`; AgentError timeout when nothing comes for as long as it may take."""
        patience = self._waits.answer if seconds is None else seconds
        while not done():
            if not self.serve(patience):
                raise self._late(patience, setting or self._waits.answer_setting)

    def serve(self, seconds: float) -> bool:
        """Wait for the socket and do what it is ready for. Whether it was ready for anything."""
        if self._fence.closed:
            raise Fenced
        return self._call(self.handle.poll, math.ceil(seconds * 1000)) == 1

    def completed(self, cookie: int) -> bool:
        return bool(self._call(self.handle.aio_command_completed, cookie))

    def wait(self, cookie: int) -> None:
        """As `until` it is completed, five times for each MiB; a fence that is closed shows in the socket."""
        milliseconds = math.ceil(self._waits.answer * 1000)
        try:
            while not self.handle.aio_command_completed(cookie):
                if self.handle.poll(milliseconds) == 0:
                    raise self._late(self._waits.answer, self._waits.answer_setting)
        except nbd.Error as error:
            raise self._error(error) from error

    # Requests

    def pread(self, buffer: Any, offset: int) -> int:
        """Fill an nbd.Buffer; the cookie."""
        return self._call(self.handle.aio_pread, buffer, offset)

    def pwrite(self, buffer: Any, offset: int) -> int:
        return self._call(self.handle.aio_pwrite, buffer, offset)

    def cache(self, length: int, offset: int) -> int:
        return self._call(self.handle.aio_cache, length, offset)

    def zero(self, length: int, offset: int, *, no_hole: bool = False) -> int:
        return self._call(self.handle.aio_zero, length, offset, None, nbd.CMD_FLAG_NO_HOLE if no_hole else 0)

    def flush(self) -> None:
        """What was completed before is durable when this returns."""
        cookie = self._call(self.handle.aio_flush)
        self.until(lambda: self.completed(cookie), self._waits.flush, self._waits.flush_setting)

    def status(self, offset: int, length: int) -> list[tuple[int, ...]]:
        """(length, the flags of each of the contexts) from `offset` on; may stop early, or tell of more."""
        found: dict[str, list[Any]] = {}

        def extent(context: str, _: int, entries: list[Any], __: Any) -> int:
            found[context] = entries
            return 0

        ask = getattr(self.handle, "aio_block_status_64", None) or self.handle.aio_block_status
        self.wait(self._call(ask, length, offset, extent))
        answer = merged([pairs(found.get(context, [])) for context in self._contexts])
        if not answer:
            raise AgentError("io_error", f"{self._server} does not tell what is allocated at byte {offset}")
        return answer

    # Parts

    def _connect(self) -> None:
        self.handle.set_opt_mode(True)
        self._call(self.handle.set_export_name, self._server.export)
        # A request that is no multiple of the server's block is its own to pad, which QEMU does.
        self.handle.set_strict_mode(self.handle.get_strict_mode() & ~nbd.STRICT_ALIGN)
        one = dial(self._server, self._waits, self._fence)
        self._fence.hold(one)
        self._call(self.handle.aio_connect_socket, one.dup().detach())  # which owns what it gets
        self._negotiate(lambda: bool(self.handle.aio_is_negotiating() or self.handle.aio_is_ready()))

    def _negotiate(self, done: Callable[[], bool]) -> None:
        self.until(done, self._waits.connect, self._waits.connect_setting)

    def _call(self, call: Callable[..., Any], *arguments: Any) -> int:
        try:
            return int(call(*arguments) or 0)
        except nbd.Error as error:
            raise self._error(error) from error

    def _late(self, seconds: float, setting: str) -> AgentError:
        message = f"{self._server} did not answer within {seconds:g} s ({setting})"
        return AgentError("timeout", message, remedy="see whether its storage hangs")

    def _error(self, error: Any) -> Exception:
        number, what = error.errnum, self._server
        if self._fence.closed:
            return Fenced()
        if number in _LOST or self.closed:
            why = "" if number in _LOST else f": {error.string}"
            return AgentError("unavailable", f"{what} was closed{why}", remedy="its storage daemon may have ended")
        if number in (errno.ENOSPC, errno.EDQUOT):
            return AgentError("no_space", f"no space left on the storage of {what}", remedy="make space, then go on")
        if number in (errno.EIO, None, 0):
            return AgentError("io_error", f"Input/output error on {what}", remedy="look at the storage below it")
        message, remedy = f"{what}: {error.string}", "see whether its server still runs"
        if number == errno.ENOENT:
            return AgentError("not_found", message, remedy="see which exports its server has")
        if number in _DENIED:
            return AgentError("denied", message, remedy="see whether the export is writable")
        return AgentError("io_error", message, remedy=remedy)


def _noting(ended: list[int]) -> Callable[[Any], int]:
    """A completion callback that notes the error number, 0 for none, and retires the command."""

    def completion(error: Any) -> int:
        ended.append(error.value)
        return 1

    return completion


def pairs(entries: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """(length, flags) of one context's extents: a flat list in libnbd's block_status, tuples in its block_status_64."""
    if entries and isinstance(entries[0], tuple):
        return iter(entries)
    return zip(entries[::2], entries[1::2], strict=True)


def merged(contexts: Sequence[Iterator[tuple[int, int]]]) -> list[tuple[int, ...]]:
    """Lists of (length, flags) pairs cut at each other's borders: (length, flags, flags …), as long as the shortest."""
    result: list[tuple[int, ...]] = []
    left = [(0, 0)] * len(contexts)
    while contexts:
        try:
            left = [one if one[0] else next(pair) for one, pair in zip(left, contexts, strict=True)]
        except StopIteration:
            break
        length = min(one[0] for one in left)
        if length:
            result.append((length, *(flags for _, flags in left)))
        left = [(size - length, flags) for size, flags in left]
    return result
