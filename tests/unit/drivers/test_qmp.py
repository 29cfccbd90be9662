"""A monitor whose daemon dies while it is connected to."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from hostagent.drivers.qmp import Monitor
from jobs.errors import JobError

GREETING = (
    b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}\r\n'
)


def monitor() -> Monitor:
    return Monitor("it", connect_timeout=5, call_timeout=5, on_event=lambda name, data: None, on_close=lambda: None)


def test_one_that_closes_after_its_greeting_is_an_error_of_the_daemon() -> None:
    async def go() -> None:
        ours, theirs = socket.socketpair()
        theirs.sendall(GREETING)
        theirs.shutdown(socket.SHUT_WR)
        with theirs, pytest.raises(JobError) as refused:
            await monitor().connect("/m", ours)
        assert refused.value.code == "unresponsive"

    asyncio.run(go())


def test_one_that_closes_when_the_session_has_just_been_made_is_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def too_late(*_: Any) -> None:
        raise AssertionError  # as QMPClient.connect has it, which asserts that it is connected

    async def go() -> None:
        made = monitor()
        monkeypatch.setattr(made._client, "connect", too_late)
        with pytest.raises(JobError, match="it was closed") as refused:
            await made.connect("/m")
        assert refused.value.code == "unresponsive"

    asyncio.run(go())
