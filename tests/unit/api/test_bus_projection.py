"""Which bus a setting means, and what is said where there is none. The agent goes on in any case."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from hostagent.api import dbus
from hostagent.api.projection.projection import SYSTEM, Projection, address_of
from hostagent.config import Dbus
from hostagent.errors import AgentError

ROOT, USER = 0, 1000


@pytest.mark.parametrize(
    ("uid", "setting", "environment", "address"),
    [
        (ROOT, "auto", {}, SYSTEM),
        (ROOT, "auto", {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/x"}, "unix:path=/x"),
        (USER, "auto", {"DBUS_SESSION_BUS_ADDRESS": "unix:path=/y"}, None),
        (USER, "system", {}, SYSTEM),
        (USER, "session", {"DBUS_SESSION_BUS_ADDRESS": "unix:path=/y"}, "unix:path=/y"),
        (USER, "session", {"XDG_RUNTIME_DIR": "/run/user/7"}, "unix:path=/run/user/7/bus"),
        (ROOT, "off", {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/x"}, None),
        (ROOT, "unix:path=/z", {}, "unix:path=/z"),
    ],
)
def test_the_bus_that_a_setting_means(
    monkeypatch: pytest.MonkeyPatch, uid: int, setting: str, environment: dict[str, str], address: str | None
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    for name in ("DBUS_SYSTEM_BUS_ADDRESS", "DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found, why = address_of(setting)
    assert found == address
    assert bool(why) == (address is None)


def made(**settings: Any) -> Projection:
    return Projection(Dbus(**settings), host="h", never=frozenset)


def test_an_address_that_is_none_is_refused_at_the_start() -> None:
    with pytest.raises(AgentError) as refused:
        made(address="sytem")
    assert refused.value.field == "dbus.address"
    assert refused.value.remedy


def test_what_is_off_takes_nothing_and_asks_for_nothing() -> None:
    projection = made(address="off")
    for number in range(100):
        projection.touch("job", str(number), "running")
    assert projection.check() == {"ok": True, "detail": "off (dbus.address)"}
    assert projection.dropped == 0
    asyncio.run(asyncio.wait_for(projection.run(None, None), 5))  # type: ignore[arg-type]


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dbus, "library", None)
    projection = made(address="system")
    assert not projection.on
    assert "pip install" in projection.check()["remedy"]
    asyncio.run(asyncio.wait_for(projection.run(None, None), 5))  # type: ignore[arg-type]


def test_a_bus_that_is_not_there_is_looked_for_and_is_a_fault_only_where_it_was_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: ROOT)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")

    async def scenario(address: str) -> dict[str, Any]:
        projection = made(address=address, reconnect_wait=0.1, queue=10)
        running = asyncio.create_task(projection.run(None, None))  # type: ignore[arg-type]
        for number in range(100):
            projection.touch("job", str(number), "running")
        async with asyncio.timeout(20):
            while not projection.state.absent:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # and some attempts more
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert not projection.state.connected
        assert projection.dropped == 0  # nobody was to be told
        return projection.check()

    automatic = asyncio.run(scenario("auto"))
    assert [record.message for record in caplog.records].count("not on the bus") == 1
    assert automatic["ok"] and "remedy" not in automatic and "there is no bus" in automatic["detail"]
    named = asyncio.run(scenario("system"))
    assert named["ok"] and named["remedy"] == "it is tried again by itself"
