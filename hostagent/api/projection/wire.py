"""One connection to a message bus, that never blocks the loop and holds no more than its bounds.

The bus and whoever calls over it are strangers: a frame that cannot be read is skipped, a longer one than `max_message`
is refused unread, only so many are looked at before the loop turns, and while the bus takes nothing no call is read. A
bus that takes nothing for `stall_timeout` is cut off. The authentication is EXTERNAL (the D-Bus specification,
"Authentication Protocol").
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from hostagent.api import dbus
from hostagent.api.projection.message import STANDARD, BusError, Kind, Message, to_bus
from hostagent.errors import AgentError

log = logging.getLogger(__name__)

BATCH = 16
"""Messages that are looked at before the loop turns."""
HIGH = 256 * 1024
"""Bytes that may wait for the bus before nothing more is sent or read."""
LARGEST = 1 << 27
"""Bytes of the largest message that there can be; a bus that announces more is none."""
LINE = 4096
"""Bytes of an answer during authentication."""


class Closed(ConnectionError):
    """The connection is gone, and why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Named as in the configuration: [dbus]."""

    call_timeout: float
    stall_timeout: float
    max_message: int


Call = Callable[["Wire", Message, bytes], None]
"""What a call is given to: its head, and the frame with its body, which is decoded when somebody wants it."""


class Wire(asyncio.Protocol):
    """Use `connect`. `closed` is set when the connection is gone, `heard` is when something came last (the
    loop's time)."""

    def __init__(self, limits: Limits, on_call: Call) -> None:
        loop = asyncio.get_running_loop()
        self.closed = asyncio.Event()
        self.name = ""
        self.heard = loop.time()
        self._limits = limits
        self._on_call = on_call
        self._loop = loop
        self._transport: asyncio.Transport
        self._authenticated: asyncio.Future[None] = loop.create_future()
        self._buffer = bytearray()
        self._skip = 0
        self._parsing = False
        self._serial = 0
        self._calls: dict[int, asyncio.Future[Message]] = {}
        self._writable = asyncio.Event()
        self._writable.set()
        self._stalled: asyncio.TimerHandle | None = None
        self._why = "the bus has closed the connection"

    @classmethod
    async def connect(cls, address: str, limits: Limits, on_call: Call) -> Wire:
        """An authenticated connection that has a name on the bus. Raises OSError and TimeoutError."""
        loop = asyncio.get_running_loop()
        wire: Wire | None = None
        try:
            async with asyncio.timeout(limits.call_timeout):
                _, wire = await loop.create_unix_connection(lambda: cls(limits, on_call), unix_path(address))
                await wire._authenticated
                wire.name = (await wire.call(to_bus("Hello"))).body[0]
            return wire
        except BaseException:
            if wire is not None:
                wire.abort("it was not let in")
            raise

    # Sending

    async def call(self, message: Message, timeout: float | None = None) -> Message:
        """The answer. Raises BusError for one that is an error, Closed and TimeoutError."""
        answer: asyncio.Future[Message] = self._loop.create_future()
        serial = self.send(message)
        self._calls[serial] = answer
        try:
            async with asyncio.timeout(self._limits.call_timeout if timeout is None else timeout):
                found = await answer
        finally:
            del self._calls[serial]
        if found.kind is Kind.ERROR:
            raise BusError(found.error, str(found.body[0]) if found.body else "")
        return found

    def send(self, message: Message) -> int:
        """Its serial number."""
        self._serial += 1
        self._write(dbus.encode(message, self._serial))
        return self._serial

    async def send_large(self, message: Message) -> None:
        """One that takes long to marshal: that is done beside the loop."""
        self._serial += 1
        self._write(await asyncio.to_thread(dbus.encode, message, self._serial))

    async def room(self) -> None:
        """Return when the bus takes more. Raises Closed."""
        await self._writable.wait()
        if self.closed.is_set():
            raise Closed(self._why)

    def close(self) -> None:
        """Once what was sent is out."""
        self._why = "we have closed the connection"
        self._transport.close()

    def abort(self, why: str) -> None:
        self._why = why
        self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self.closed.is_set():
            raise Closed(self._why)
        self._transport.write(data)

    # Flow (asyncio.Protocol)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=HIGH)
        transport.write(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._why = f"the connection to the bus broke: {exc}"
        gone = Closed(self._why)
        self._cancel_stalled()
        waiters: list[asyncio.Future[Any]] = [self._authenticated, *self._calls.values()]
        for waiting in waiters:
            if not waiting.done():
                waiting.set_exception(gone)
                waiting.exception()  # somebody may not wait for it any more
        self.closed.set()
        self._writable.set()

    @property
    def why(self) -> str:
        """Why it is closed."""
        return self._why

    def pause_writing(self) -> None:
        self._writable.clear()
        self._transport.pause_reading()
        seconds = self._limits.stall_timeout
        self._stalled = self._loop.call_later(
            seconds, self.abort, f"the bus took nothing for {seconds:g} s (dbus.stall_timeout)"
        )

    def resume_writing(self) -> None:
        self._cancel_stalled()
        self._writable.set()
        self._parse()

    def _cancel_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    # Reading

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self.heard = self._loop.time()
        if not self._authenticated.done():
            self._authenticate()
        else:
            self._parse()

    def _authenticate(self) -> None:
        line, end, rest = bytes(self._buffer).partition(b"\r\n")
        if not end:
            if len(line) > LINE:
                self.abort("what listens there is no message bus")
            return
        if not line.startswith(b"OK "):
            self.abort(f"the bus refuses uid {os.geteuid()}: {line[:200].decode(errors='replace')}")
            return
        self._buffer = bytearray(rest)
        self._transport.write(b"BEGIN\r\n")
        self._authenticated.set_result(None)

    def _parse(self) -> None:
        """Look at some messages, and go on after the loop has turned."""
        if self._parsing:
            return
        for _ in range(BATCH):
            if self.closed.is_set() or self._transport.is_closing() or not self._writable.is_set():
                return
            frame = self._frame()
            if frame is None:
                self._transport.resume_reading()
                return
            if frame:
                self._take(frame)
        self._transport.pause_reading()
        self._parsing = True
        self._loop.call_soon(self._parse_on)

    def _parse_on(self) -> None:
        self._parsing = False
        self._parse()

    def _frame(self) -> bytes | None:
        """The next message, None when it is not here yet, empty when it was skipped."""
        if self._skip:
            gone = min(self._skip, len(self._buffer))
            del self._buffer[:gone]
            self._skip -= gone
            if self._skip:
                return None
        if len(self._buffer) < dbus.FIXED:
            return None
        try:
            head, body = dbus.sizes(self._buffer)
            if head + body > LARGEST:
                raise dbus.Malformed(f"a message announces {head + body} bytes")
        except dbus.Malformed as error:
            self.abort(f"what listens there is no message bus: {error}")
            return None
        if head + body <= self._limits.max_message:
            return self._taken(head + body)
        if head > self._limits.max_message:
            self._skip = head + body
            return b""
        if (frame := self._taken(head)) is None:
            return None
        self._skip = body
        self._refuse_large(frame)
        return b""

    def _taken(self, size: int) -> bytes | None:
        if len(self._buffer) < size:
            return None
        frame = bytes(self._buffer[:size])
        del self._buffer[:size]
        return frame

    def _refuse_large(self, frame: bytes) -> None:
        try:
            message = dbus.decode(frame, body=False)
        except dbus.Malformed:
            return
        if message.kind is Kind.CALL:
            said = f"a message may have {self._limits.max_message} bytes (dbus.max_message)"
            self.send(failure(message, STANDARD + "LimitsExceeded", said))
        elif (waiting := self._calls.get(message.reply_to)) and not waiting.done():
            waiting.set_exception(BusError(STANDARD + "LimitsExceeded", "the answer is too long"))

    def _take(self, frame: bytes) -> None:
        try:
            message = dbus.decode(frame, body=False)
            if message.kind is Kind.CALL:
                self._on_call(self, message, frame)
            elif message.kind is not Kind.SIGNAL:
                waiting = self._calls.get(message.reply_to)
                if waiting is not None and not waiting.done():
                    waiting.set_result(dbus.decode(frame))
        except dbus.Malformed as error:
            log.debug("a message of the bus was not understood", extra={"fields": {"error": str(error)}})


def reply(call: Message, signature: str = "", *body: Any) -> Message:
    return Message(Kind.REPLY, destination=call.sender, reply_to=call.serial, signature=signature, body=body, flags=1)


def failure(call: Message, name: str, message: str) -> Message:
    return Message(
        Kind.ERROR, destination=call.sender, reply_to=call.serial, error=name, signature="s", body=(message,), flags=1
    )


def unix_path(address: str) -> str:
    """Where the socket of the first unix address in a list of them is. Raises AgentError."""
    for one in address.split(";"):
        transport, _, rest = one.partition(":")
        options = dict(pair.split("=", 1) for pair in rest.split(",") if "=" in pair)
        if transport == "unix" and "path" in options:
            return unquote(options["path"])
        if transport == "unix" and "abstract" in options:
            return "\0" + unquote(options["abstract"])
    raise AgentError(
        "invalid",
        f"{address!r} is no address of a bus on this host",
        field="dbus.address",
        value=address,
        remedy="write unix:path=/run/dbus/system_bus_socket",
    )
