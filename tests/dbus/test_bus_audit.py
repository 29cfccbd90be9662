"""What is changed over the bus stands in the audit, by the caller that the bus names; and what somebody was kept from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hostagent.api.projection.message import BusError
from tests.dbus.bus import Caller, Polkit, PrivateBus, until
from tests.harness import MIB, AgentProcess, Json, overlay, raw_image

pytestmark = [pytest.mark.qemu, pytest.mark.root]

MANAGER, EXPORT, ROOT = "org.hostagent1.Manager", "org.hostagent1.Export", "/org/hostagent1"
NOBODY = 65534


def lines(agent: AgentProcess, what: str) -> list[Json]:
    file = agent.state / "audit.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in found if line["what"] == what and line["surface"] == "dbus"]


def test_a_call_on_the_bus_has_its_line(caller: Caller, agent: AgentProcess, folder: Path) -> None:
    top = overlay(folder / "top.qcow2", raw_image(folder / "base.raw", MIB))
    export = caller.call(ROOT, MANAGER, "StartExport", "sa{sv}", str(top), {})
    caller.call(export, EXPORT, "Stop", "a{sv}", {})
    until(lambda: lines(agent, "export stop"), "both are written")
    (started,), (stopped,) = lines(agent, "export start"), lines(agent, "export stop")
    assert started["image"] == str(top) and started["id"] == stopped["id"]
    assert {line["who"] for line in (started, stopped)} == {f"uid {os.geteuid()}"}
    assert {line["result"] for line in (started, stopped)} == {"ok"}
    assert started["from"].startswith("pid ") and started["request"] != stopped["request"]


def test_so_has_one_that_was_refused(bus: PrivateBus, agent: AgentProcess, caller: Caller) -> None:
    polkit = Polkit(bus.socket)
    polkit.answer = "no"
    try:
        with Caller(bus.socket, NOBODY) as stranger, pytest.raises(BusError):
            stranger.call(ROOT, MANAGER, "StartExport", "sa{sv}", "/a", {})
    finally:
        polkit.close()
    (line,) = until(lambda: lines(agent, f"{MANAGER}.StartExport"), "it is written")
    assert (line["who"], line["result"]) == (f"uid {NOBODY}", "denied")
