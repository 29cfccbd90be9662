from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from hostagent import watchdog
from jobs.errors import JobError

PATIENCE = 0.2


@pytest.fixture
def manager(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    path = tmp_path_factory.mktemp("n") / "n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        yield listener


def fed(
    manager: socket.socket, store: Callable[[], Awaitable[object]], beat: Callable[[], float | None] = lambda: None
) -> int:
    """How often in three of its intervals."""

    async def story() -> None:
        feeding = asyncio.create_task(watchdog.feed(PATIENCE, store, beat))
        await asyncio.sleep(3 * PATIENCE)
        feeding.cancel()

    asyncio.run(story())
    number = 0
    while True:
        try:
            assert manager.recv(100) == b"WATCHDOG=1"
        except BlockingIOError:
            return number
        number += 1


async def answers() -> None: ...


async def hangs() -> None:
    await asyncio.sleep(3600)


async def full() -> None:
    raise JobError("store_full", "no space")


def test_it_is_fed_while_all_is_well(manager: socket.socket) -> None:
    assert fed(manager, answers) >= 6
    assert fed(manager, answers, time.monotonic) >= 6


def test_a_store_that_hangs_ends_that(manager: socket.socket) -> None:
    assert fed(manager, hangs) == 0


def test_one_that_is_full_does_not_for_no_restart_mends_it(manager: socket.socket) -> None:
    assert fed(manager, full) >= 6


def test_a_thread_of_libvirts_that_hangs_ends_it(manager: socket.socket) -> None:
    began = time.monotonic()
    assert 1 <= fed(manager, answers, lambda: began) <= 4


def test_a_blocked_loop_ends_it(manager: socket.socket) -> None:
    async def blocks() -> None:
        time.sleep(2 * PATIENCE)

    assert fed(manager, blocks) <= 2


@pytest.mark.parametrize(
    ("microseconds", "pid", "seconds"),
    [("60000000", None, 60.0), ("60000000", "1", None), ("soon", None, None), (None, None, None)],
)
def test_whether_the_manager_wants_it(
    monkeypatch: pytest.MonkeyPatch, microseconds: str | None, pid: str | None, seconds: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", pid or str(os.getpid()))):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert watchdog.interval() == seconds


def test_the_event_loop_of_libvirt_beats(tmp_path: Path) -> None:
    pytest.importorskip("libvirt")
    from hostagent.drivers import libvirt

    libvirt.start_event_loop()
    time.sleep(2.5 * libvirt.BEAT)
    last = libvirt.last_beat()
    assert last is not None and time.monotonic() - last < 1.5 * libvirt.BEAT
