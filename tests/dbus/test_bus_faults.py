"""What a bus may do to the agent: stand still, be killed and come back, be full of other people. No job notices."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.api.projection.message import Kind, Message, Variant
from tests.dbus.bus import NAME, Caller, PrivateBus, until
from tests.dbus.conftest import SETTINGS, check, on_the_bus
from tests.harness import MIB, AgentProcess, overlay, raw_image, same_content

pytestmark = pytest.mark.qemu

MANAGER, JOB, EXPORT = (f"org.hostagent1.{noun}" for noun in ("Manager", "Job", "Export"))
ROOT = "/org/hostagent1"


@pytest.fixture(autouse=True)
def _the_bus_runs(bus: PrivateBus) -> Iterator[None]:
    yield
    if bus.process is None:
        bus.start()
    bus.thaw()


@pytest.fixture
def top(folder: Path) -> Path:
    return overlay(folder / "top.qcow2", raw_image(folder / "base.raw", 4 * MIB))


def gauge(agent: AgentProcess, name: str) -> float:
    lines = str(agent.get("/metrics")).splitlines()
    return float(next(line for line in lines if line.startswith(f"hostagent_{name} ")).split()[1])


def quick(agent: AgentProcess) -> None:
    """The agent's loop turns: whoever waited for this bus would wait until it goes on."""
    agent.get("/healthz", timeout=10)


def test_a_bus_that_is_killed_in_the_middle_of_a_job_changes_nothing(
    agent: AgentProcess, bus: PrivateBus, caller: Caller, top: Path
) -> None:
    path = caller.call(ROOT, MANAGER, "StartJob", "ssa{sv}", "pull", str(top), {"bandwidth": Variant("t", MIB)})
    export = caller.call(ROOT, MANAGER, "StartExport", "sa{sv}", str(top), {})
    id = caller.get(path, JOB, "Id")
    until(lambda: agent.job(id)["cursor"]["cur"] > 0, "it moves")
    bus.kill()
    until(lambda: gauge(agent, "dbus_connected") == 0, "the agent knows")
    found = check(agent)
    assert found["ok"] and found["detail"].startswith("not connected") and "remedy" in found
    assert agent.get("/readyz")["ready"]
    before = agent.job(id)
    assert before["state"] == "running"

    bus.start()
    on_the_bus(agent)
    assert gauge(agent, "dbus_connected") == 1
    with Caller(bus.socket) as other:
        shown = other.managed()
        assert shown[path][JOB]["Id"] == id
        assert shown[export][EXPORT]["State"] == "running"
        other.listen()
        assert other.heard("JobRemoved").body == (id, path, str(top), "completed")
        assert agent.until_ended(id)["state"] == "completed"
        other.call(export, EXPORT, "Stop", "a{sv}", {})


def test_a_bus_that_stands_still_in_a_burst_is_left_and_found_again(
    agent: AgentProcess, bus: PrivateBus, caller: Caller, folder: Path
) -> None:
    """More is to be told meanwhile than its socket holds."""
    text = {"labels": {f"label {n}": "x" * 250 for n in range(32)}}  # 9 KiB in every object
    bus.freeze()
    images = [raw_image(folder / f"{n}.raw", MIB) for n in range(60)]
    began = time.monotonic()
    exports = [agent.export(image, format="raw", **text) for image in images]
    tops = [overlay(folder / f"{n}.qcow2", raw_image(folder / f"base{n}.raw", MIB)) for n in range(4)]
    jobs = [agent.pull(one, **text) for one in tops]
    for job in jobs:
        assert agent.until_ended(job["id"])["state"] == "completed"
        quick(agent)
    until(lambda: gauge(agent, "dbus_connected") == 0, "the agent leaves it")
    quick(agent)
    for export in exports:
        agent.delete(f"/v1/exports/{export['id']}")
    assert time.monotonic() - began < 120
    bus.thaw()
    on_the_bus(agent)
    with Caller(bus.socket) as other:
        shown = other.managed()
        ended = [one[JOB] for one in shown.values() if JOB in one]
        assert {job["id"] for job in jobs} <= {job["Id"] for job in ended if job["State"] == "completed"}
        assert not [one for one in shown.values() if EXPORT in one]
    assert all(same_content(top, folder / f"base{n}.raw") for n, top in enumerate(tops))


def test_nobody_notices_a_bus_that_stands_still_in_silence_and_it_is_left(agent: AgentProcess, bus: PrivateBus) -> None:
    on_the_bus(agent)
    bus.freeze()
    until(lambda: gauge(agent, "dbus_connected") == 0, "the agent leaves it")
    assert "not connected" in check(agent)["detail"]
    quick(agent)
    bus.thaw()
    on_the_bus(agent)


def test_a_caller_who_leaves_has_started_what_he_asked_for(
    agent: AgentProcess, bus: PrivateBus, caller: Caller, top: Path
) -> None:
    with Caller(bus.socket) as gone:
        body = ("pull", str(top), {})
        gone.send(Message(Kind.CALL, ROOT, MANAGER, "StartJob", "ssa{sv}", body, destination=NAME))
    # Who has left before the bus was asked for him is nobody, and is refused; otherwise the job is there, and ends.
    with Caller(bus.socket) as other:
        other.call(ROOT, "org.freedesktop.DBus.Peer", "Ping")
    jobs = [job for job in agent.get("/v1/jobs")["items"] if job["target"] == str(top)]
    for job in jobs:
        assert agent.until_ended(job["id"])["state"] == "completed"
    on_the_bus(agent)


def test_readers_in_a_crowd_slow_nobody_and_all_are_answered(
    agent: AgentProcess, bus: PrivateBus, caller: Caller
) -> None:
    messages = [
        Message(Kind.CALL, ROOT, "org.freedesktop.DBus.Properties", "GetAll", "s", (MANAGER,), destination=NAME),
        Message(Kind.CALL, ROOT, "org.freedesktop.DBus.Introspectable", "Introspect", destination=NAME),
    ]
    serials = [caller.send(messages[n % 2]) for n in range(2000)]
    for _ in range(20):
        agent.get("/healthz", timeout=5)
    answered = 0
    while answered < len(serials):
        message = caller.read()
        if message.kind is not Kind.SIGNAL:
            assert message.kind is Kind.REPLY and message.reply_to == serials[answered]
            answered += 1


def test_calls_that_are_too_many_or_too_long_are_refused(agent: AgentProcess, caller: Caller) -> None:
    call = Message(Kind.CALL, "/", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects", destination=NAME)
    for _ in range(200):
        caller.send(call)
    found = set()
    answered = 0
    while answered < 200:
        message = caller.read()
        if message.kind is not Kind.SIGNAL:
            found.add(message.error)
            answered += 1
    assert found <= {"", "org.freedesktop.DBus.Error.LimitsExceeded"}
    assert "" in found
    long = Message(Kind.CALL, ROOT, MANAGER, "GetJob", "s", ("x" * 100_000,), destination=NAME)
    serial = caller.send(long)
    while (message := caller.read()).reply_to != serial:
        pass
    assert message.error == "org.freedesktop.DBus.Error.LimitsExceeded"
    assert "dbus.max_message" in message.body[0]
    assert caller.call(ROOT, "org.freedesktop.DBus.Peer", "Ping") == ()


def test_an_agent_that_stops_leaves_the_bus_and_comes_back_with_the_next(bus: PrivateBus, tmp_path: Path) -> None:
    """Also with another one that has the name: it says so, and works."""
    settings = {**SETTINGS, "DBUS_ADDRESS": bus.address}
    with Caller(bus.socket) as caller:
        caller.listen()
        with AgentProcess(tmp_path, settings) as second:
            until(lambda: "somebody else is org.hostagent1" in check(second)["detail"], "it is told")
            assert second.get("/readyz")["ready"]


def test_without_the_library_the_agent_runs_and_says_what_is_missing(bus: PrivateBus, tmp_path: Path) -> None:
    for name in ("dbus_next", "dbus_fast"):
        (tmp_path / "without" / name).mkdir(parents=True)
        (tmp_path / "without" / name / "__init__.py").write_text("raise ImportError\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "without"))
        with AgentProcess(tmp_path, {**SETTINGS, "DBUS_ADDRESS": bus.address}) as agent:
            found = check(agent)
            assert found["ok"] and "neither dbus-next nor dbus-fast is installed" in found["detail"]
            assert "pip install" in found["remedy"]
            assert gauge(agent, "dbus_connected") == 0
            assert agent.stop() == 0


def test_its_fork_stands_in_for_the_library(tmp_path: Path, top: Path) -> None:
    pytest.importorskip("dbus_fast")
    home = tmp_path / "bus"
    home.mkdir()
    (tmp_path / "without" / "dbus_next").mkdir(parents=True)
    (tmp_path / "without" / "dbus_next" / "__init__.py").write_text("raise ImportError\n")
    with pytest.MonkeyPatch.context() as patch, PrivateBus(home) as bus:
        patch.setenv("PYTHONPATH", str(tmp_path / "without"))
        with (
            AgentProcess(tmp_path, {**SETTINGS, "DBUS_ADDRESS": bus.address}) as agent,
            Caller(bus.socket) as caller,
        ):
            on_the_bus(agent)
            caller.listen()
            path = caller.call(ROOT, MANAGER, "StartJob", "ssa{sv}", "pull", str(top), {"increment": Variant("t", MIB)})
            until(lambda: caller.get(path, JOB, "State") == "waiting", "it waits")
            assert caller.managed()[path][JOB]["Cursor"][1] == 4 * MIB
            caller.call(path, JOB, "Cancel", "a{sv}", {})
            assert caller.heard("JobRemoved").body[3] == "aborted"
