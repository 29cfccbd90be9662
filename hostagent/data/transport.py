"""One connection's bytes: plain, or through TLS.

Sockets block, with the kernel's own timeouts (SO_RCVTIMEO, SO_SNDTIMEO): they end a call that made no progress for that
long, and never one that did, so a slow client is judged by its progress. `settimeout` would make the socket
non-blocking underneath, and sendfile(2) fail. TLS goes through a MemoryBIO, which turns a megabyte into one send, where
SSLSocket makes a system call for each record of 16 KiB (docs/data.md).
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol

from hostagent.data.streams import PIECE, PeerGone, unreadable
from hostagent.errors import AgentError

_UNSENT = 128 * 1024
"""Bytes that sendfile queues beyond what was sent. Without a limit the queue of pages grows to megabytes, and costs
three times the processor time for a third of the throughput (docs/data.md)."""
_TLS_SEND = PIECE
"""Bytes that are encrypted at a time, while as many are sent. OpenSSL keeps as much for the connection's next ones."""
_TLS_HEAD, _TLS_BODY = 4096, 256 * 1024
"""Bytes of one read of the socket: of a client that may be idle for long, and of one that sends a body."""
_GRACE = 0.001  # a kernel timeout of 0 would mean none


class Transport(Protocol):
    """PeerGone is raised for an end, a broken connection and a time without progress."""

    secure: bool

    def receive(self, buffer: memoryview, *, whole: bool = False) -> int:
        """Some bytes, all that fit if `whole` and they come in time; 0 at the end of what the peer sends."""

    def send(self, data: bytes | bytearray | memoryview) -> None: ...

    def send_file(self, fd: int, offset: int, length: int) -> None: ...

    def corked(self) -> AbstractContextManager[None]:
        """What is sent meanwhile goes out in full segments, and the rest at the end."""

    def patience(self, seconds: float) -> None:
        """How long one call may go without progress."""

    def finish(self) -> None:
        """No more is sent."""


class Plain:
    secure = False

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._patience = -1.0
        self._short = False

    def patience(self, seconds: float) -> None:
        if seconds != self._patience:
            set_patience(self.sock, seconds)
            self._patience = seconds

    def receive(self, buffer: memoryview, *, whole: bool = False) -> int:
        try:
            return self.sock.recv_into(buffer, 0, socket.MSG_WAITALL if whole else 0)
        except OSError as error:
            raise PeerGone(str(error)) from error

    def send(self, data: bytes | bytearray | memoryview) -> None:
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise PeerGone(str(error)) from error

    def send_file(self, fd: int, offset: int, length: int) -> None:
        end, out = offset + length, self.sock.fileno()
        self._keep_short()
        while offset < end:
            try:
                sent = os.sendfile(out, fd, offset, min(PIECE, end - offset))
            except OSError as error:
                raise _broken(error, out) from error
            if sent == 0:
                raise shorter(offset, end)
            offset += sent

    @contextlib.contextmanager
    def corked(self) -> Iterator[None]:
        self._set(socket.TCP_CORK, 1)
        try:
            yield
        finally:
            self._set(socket.TCP_CORK, 0)

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def _keep_short(self) -> None:
        if not self._short:
            self._set(socket.TCP_NOTSENT_LOWAT, _UNSENT)
        self._short = True

    def _set(self, option: int, value: int) -> None:
        """Of TCP; one that was shut down meanwhile says so at the next call."""
        if self.sock.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.IPPROTO_TCP, option, value)


class Tls:
    """The server's side; `handshake` comes first, in the connection's own thread."""

    secure = True

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self._plain = Plain(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._buffer = bytearray(_TLS_HEAD)
        self._pieces = bytearray(0)
        self._sender: ThreadPoolExecutor | None = None
        self._sending: Future[None] | None = None

    def handshake(self, timeout: float) -> None:
        """Within `timeout` seconds in all, however slowly the peer sends. PeerGone; ssl.SSLError for what is no TLS."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._tls.do_handshake()
                self._push()
                return
            except ssl.SSLWantReadError:
                self._push()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise PeerGone("no TLS handshake in time") from None
                self._plain.patience(left)
                self._pull()
            except ssl.SSLError:
                with contextlib.suppress(PeerGone):
                    self._push()  # the alert that says why
                raise

    def patience(self, seconds: float) -> None:
        self._plain.patience(seconds)

    def receive(self, buffer: memoryview, *, whole: bool = False) -> int:
        if whole and len(self._buffer) < _TLS_BODY:
            self._buffer = bytearray(_TLS_BODY)
        while True:
            try:
                return int(self._tls.read(len(buffer), buffer))
            except ssl.SSLWantReadError:
                self._push()
                if not self._pull():
                    return 0
            except ssl.SSLZeroReturnError:
                return 0
            except ssl.SSLError as error:
                raise PeerGone(str(error)) from error

    def send(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        for begin in range(0, len(view), _TLS_SEND):
            try:
                self._tls.write(view[begin : begin + _TLS_SEND])
            except ssl.SSLError as error:
                raise PeerGone(str(error)) from error
            self._push()

    def send_file(self, fd: int, offset: int, length: int) -> None:
        if not self._pieces:
            self._pieces = bytearray(_TLS_SEND)
        view, end = memoryview(self._pieces), offset + length
        while offset < end:
            try:
                number = os.preadv(fd, [view[: min(len(view), end - offset)]], offset)
            except OSError as error:
                raise unreadable(error) from error
            if number == 0:
                raise shorter(offset, end)
            self.send(view[:number])
            offset += number

    @contextlib.contextmanager
    def corked(self) -> Iterator[None]:
        """Much is sent in a thread of its own meanwhile, so that the next piece is encrypted beside it."""
        with self._plain.corked(), ThreadPoolExecutor(1, thread_name_prefix="send") as self._sender:
            try:
                yield
                self._await_sent()
            finally:
                self._sender = self._sending = None
                self._pieces = bytearray(0)

    def finish(self) -> None:
        with contextlib.suppress(ssl.SSLError, PeerGone):
            self._tls.unwrap()
        with contextlib.suppress(PeerGone):
            self._push()
        self._plain.finish()

    def _push(self) -> None:
        if not self._outgoing.pending:
            return
        data = self._outgoing.read()
        self._await_sent()
        if self._sender is None or len(data) < _TLS_SEND:
            self._plain.send(data)
            return
        try:
            self._sending = self._sender.submit(self._plain.send, data)
        except RuntimeError as error:  # no thread to be had, and the executor may have one later for what it was given
            raise PeerGone(str(error)) from error

    def _await_sent(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            sending.result()

    def _pull(self) -> int:
        number = self._plain.receive(memoryview(self._buffer))
        if number:
            self._incoming.write(memoryview(self._buffer)[:number])
        else:
            self._incoming.write_eof()
        return number


def set_patience(sock: socket.socket, seconds: float) -> None:
    seconds = max(seconds, _GRACE)
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1_000_000))
    with contextlib.suppress(OSError):  # a socket that was shut down meanwhile says so at the next call
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def shorter(offset: int, end: int) -> AgentError:
    return AgentError("image_changed", f"the file ends at byte {offset}, before byte {end}: somebody has cut it")


def _broken(error: OSError, out: int) -> Exception:
    """sendfile fails for the file, too: what the socket does not say is an error of the file."""
    if isinstance(error, BlockingIOError | ConnectionError | BrokenPipeError) or out < 0:
        return PeerGone(str(error))
    return unreadable(error)
