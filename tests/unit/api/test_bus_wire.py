"""One connection to a bus that is played here: it does what no bus should, and the loop goes on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hostagent.api import dbus
from hostagent.api.projection.message import BusError, Kind, Message, Variant
from hostagent.api.projection.wire import BATCH, HIGH, Closed, Limits, Wire, failure, reply, unix_path
from hostagent.errors import AgentError

LIMITS = Limits(call_timeout=1.0, stall_timeout=0.3, max_message=4096)

Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Bus = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


@contextlib.asynccontextmanager
async def listening(bus: Bus) -> AsyncIterator[str]:
    with tempfile.TemporaryDirectory(prefix="hb-") as folder:
        path = Path(folder) / "bus"

        async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await bus(reader, writer)
            writer.close()

        server = await asyncio.start_unix_server(served, path)
        try:
            yield f"unix:path={path}"
        finally:
            server.close()


async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Authentication, and Hello."""
    assert (await reader.readline()).startswith(b"\0AUTH EXTERNAL ")
    writer.write(b"OK 1234\r\n")
    assert await reader.readline() == b"BEGIN\r\n"
    hello = await received(reader)
    assert hello.member == "Hello"
    answer = Message(Kind.REPLY, signature="s", body=(":1.1",), reply_to=hello.serial, destination=":1.1")
    writer.write(dbus.encode(answer, 1))


async def received(reader: asyncio.StreamReader) -> Message:
    head = await reader.readexactly(dbus.FIXED)
    return dbus.decode(head + await reader.readexactly(sum(dbus.sizes(head)) - dbus.FIXED))


def a_call(member: str = "Ask", *body: Any, serial: int = 9, signature: str = "") -> bytes:
    message = Message(Kind.CALL, "/", "a.b", member, signature, body)
    return dbus.encode(message, serial)


class Calls:
    """Answers each call with its member."""

    def __init__(self) -> None:
        self.members: list[str] = []

    def __call__(self, wire: Wire, call: Message, frame: bytes) -> None:
        self.members.append(call.member)
        assert call.body == ()
        wire.send(reply(call, "s", call.member))


def test_a_call_is_answered_and_ours_is() -> None:
    async def bus(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await welcome(reader, writer)
        writer.write(a_call("First", serial=5) + a_call("Second", {"a": Variant("t", 1)}, serial=6, signature="a{sv}"))
        found = [await received(reader) for _ in range(3)]  # the third is our question, whenever it comes
        answers = [one for one in found if one.kind is Kind.REPLY]
        assert [(one.reply_to, one.body) for one in answers] == [(5, ("First",)), (6, ("Second",))]
        asked = next(one for one in found if one.kind is Kind.CALL)
        writer.write(dbus.encode(Message(Kind.REPLY, signature="u", body=(7,), reply_to=asked.serial), 2))
        asked = await received(reader)
        writer.write(dbus.encode(failure(Message(Kind.CALL, serial=asked.serial), "a.b.No", "never"), 3))
        await reader.read()

    async def scenario() -> None:
        async with listening(bus) as address:
            wire = await Wire.connect(address, LIMITS, Calls())
            assert wire.name == ":1.1"
            question = Message(Kind.CALL, "/", "a.b", "What", destination="a.b")
            assert (await wire.call(question)).body == (7,)
            with pytest.raises(BusError, match=r"a\.b\.No: never"):
                await wire.call(question)
            with pytest.raises(TimeoutError):
                await wire.call(question, 0.05)
            wire.close()

    run(scenario)


async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def rejects(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()
    writer.write(b"REJECTED EXTERNAL\r\n")
    await reader.read()


async def talks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"x" * 10000)
    await reader.read()


async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()


async def no_hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()
    writer.write(b"OK 1\r\n")
    await reader.read()


@pytest.mark.parametrize("bus", [nothing, rejects, talks, hangs_up, no_hello])
def test_what_does_not_let_us_in_is_left_in_time(bus: Bus) -> None:
    async def scenario() -> None:
        async with listening(bus) as address:
            began = time.monotonic()
            with pytest.raises((Closed, TimeoutError)):
                await Wire.connect(address, LIMITS, Calls())
            assert time.monotonic() - began < 5

    run(scenario)


def test_a_bus_that_lets_nobody_in_any_more_is_left_in_time() -> None:
    """Its queue of connections is full: connect(2) would block."""

    async def scenario() -> None:
        with tempfile.TemporaryDirectory(prefix="hb-") as folder, contextlib.ExitStack() as stack:
            path = str(Path(folder) / "bus")
            full = stack.enter_context(socket.socket(socket.AF_UNIX))
            full.bind(path)
            full.listen(1)
            with contextlib.suppress(BlockingIOError):
                while True:
                    waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                    waiting.setblocking(False)
                    waiting.connect(path)
            began = time.monotonic()
            with pytest.raises((OSError, TimeoutError)):
                await Wire.connect(f"unix:path={path}", LIMITS, Calls())
            assert time.monotonic() - began < 5

    run(scenario)


def test_a_bus_that_takes_nothing_is_left_and_nobody_has_waited_for_it() -> None:
    async def bus(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await welcome(reader, writer)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(20)

    async def scenario() -> None:
        async with listening(bus) as address:
            wire = await Wire.connect(address, LIMITS, Calls())
            signal = Message(Kind.SIGNAL, "/", "a.b", "News", "s", ("x" * 2000,))
            sent = 0
            began = time.monotonic()
            with pytest.raises(Closed, match=r"dbus\.stall_timeout"):
                while True:
                    await wire.room()
                    wire.send(signal)  # one that waited for this bus would wait for ever
                    sent += 1
            assert 0.2 < time.monotonic() - began < 10
            assert HIGH < sent * 2000 < 20 * HIGH  # our bound, and what the kernel holds
            with pytest.raises(Closed):
                wire.send(signal)

    run(scenario)


def test_while_nothing_is_taken_no_call_is_read() -> None:
    calls = Calls()

    async def bus(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await welcome(reader, writer)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            for _ in range(2000):
                writer.write(a_call("A" * 200) * 10)
                await writer.drain()

    async def scenario() -> None:
        async with listening(bus) as address:
            wire = await Wire.connect(address, LIMITS, calls)
            await wire.closed.wait()
            assert "dbus.stall_timeout" in wire.why
            assert len(calls.members) < 15000

    run(scenario)


def test_a_flood_of_calls_leaves_the_loop_its_turns() -> None:
    calls = Calls()

    async def bus(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await welcome(reader, writer)
        writer.write(a_call() * 3000)
        for _ in range(3000):
            await received(reader)
        writer.write(b"")

    async def scenario() -> None:
        async with listening(bus) as address:
            await Wire.connect(address, LIMITS, calls)
            turns = 0
            while len(calls.members) < 3000:
                turns += 1
                await asyncio.sleep(0)
            assert turns >= 3000 // BATCH

    run(scenario)


def test_what_is_too_long_is_refused_unread_and_what_is_no_message_skipped() -> None:
    calls = Calls()
    endless = b"l\1\0\1" + (2000).to_bytes(4, "little") + bytes(4) + (1 << 20).to_bytes(4, "little")

    async def bus(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await welcome(reader, writer)
        writer.write(a_call("Long", "x" * 100_000, serial=3, signature="s"))
        writer.write(endless + bytes((1 << 20) + 2000))  # a head that is longer than a message may be
        odd = bytearray(a_call("Odd", serial=4))
        odd[1] = 99  # a type that nobody knows
        writer.write(bytes(odd) + a_call("Good", serial=5))
        refused = await received(reader)
        assert (refused.reply_to, refused.error) == (3, "org.freedesktop.DBus.Error.LimitsExceeded")
        assert (await received(reader)).reply_to == 5
        writer.write(b"this is no message")
        await reader.read()

    async def scenario() -> None:
        async with listening(bus) as address:
            wire = await Wire.connect(address, LIMITS, calls)
            await wire.closed.wait()
            assert "no message bus" in wire.why
            assert calls.members == ["Good"]

    run(scenario)


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("unix:path=/run/dbus/system_bus_socket", "/run/dbus/system_bus_socket"),
        ("unix:path=/tmp/a%20b,guid=1", "/tmp/a b"),
        ("tcp:host=localhost,port=1;unix:abstract=x", "\0x"),
    ],
)
def test_addresses(address: str, path: str) -> None:
    assert unix_path(address) == path


@pytest.mark.parametrize("address", ["sytem", "tcp:host=localhost,port=1", "unix:", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(AgentError) as refused:
        unix_path(address)
    assert refused.value.field == "dbus.address"
