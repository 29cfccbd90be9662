"""Who may do what: root what he wants, anybody else what polkit says, and everybody may read. polkitd is played by a
stand-in that answers, refuses, asks for a password, fails, says nonsense or hangs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.api.projection.message import INTERACTIVE, BusError, Kind, Message, Variant
from tests.dbus.bus import NAME, Caller, Polkit, PrivateBus, until
from tests.dbus.conftest import SETTINGS, on_the_bus
from tests.harness import MIB, AgentProcess, overlay, raw_image, reachable

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: other users call"),
]

MANAGER, JOB, EXPORT, GRANT = (f"org.hostagent1.{noun}" for noun in ("Manager", "Job", "Export", "Grant"))
ROOT = "/org/hostagent1"
NOBODY = 65534
DENIED = "org.hostagent1.Error.Denied"


@pytest.fixture
def polkit(bus: PrivateBus) -> Iterator[Polkit]:
    one = Polkit(bus.socket)
    yield one
    one.close()


@pytest.fixture
def stranger(bus: PrivateBus, caller: Caller) -> Iterator[Caller]:
    with Caller(bus.socket, NOBODY) as one:
        yield one


@pytest.fixture
def top(folder: Path) -> Path:
    return overlay(folder / "top.qcow2", raw_image(folder / "base.raw", 4 * MIB))


@pytest.fixture
def things(caller: Caller, agent: AgentProcess, top: Path) -> Iterator[dict[str, str]]:
    """A job, an export and a grant of root's."""
    export = caller.call(ROOT, MANAGER, "StartExport", "sa{sv}", str(top), {})
    options = {"increment": Variant("t", MIB)}
    job = caller.call(ROOT, MANAGER, "StartJob", "ssa{sv}", "pull", str(top), options)
    until(lambda: caller.get(job, JOB, "State") == "waiting", "it waits")
    grant = until(lambda: next((p for p, o in caller.managed().items() if GRANT in o), None), "there is a grant")
    yield {JOB: job, EXPORT: export, GRANT: grant}
    caller.call(job, JOB, "Cancel", "a{sv}", {})
    caller.call(export, EXPORT, "Stop", "a{sv}", {})
    agent.until_ended(caller.get(job, JOB, "Id"))


CHANGING = [
    (MANAGER, "StartJob", "ssa{sv}", ("pull", "/a", {}), "job-start"),
    (MANAGER, "StartExport", "sa{sv}", ("/a", {}), "export"),
    *(
        (JOB, verb, "a{sv}", ({},), "job-control")
        for verb in ("Cancel", "Pause", "Resume", "Complete", "Next", "Delete")
    ),
    (JOB, "SetBandwidth", "ta{sv}", (1, {}), "job-control"),
    (EXPORT, "Stop", "a{sv}", ({},), "export"),
    (GRANT, "Revoke", "a{sv}", ({},), "grant-revoke"),
    (GRANT, "Undo", "a{sv}", ({},), "grant-revoke"),
]


def refusal(caller: Caller, *call: object, flags: int = 0) -> BusError:
    with pytest.raises(BusError) as refused:
        caller.call(*call, flags=flags)  # type: ignore[arg-type]
    return refused.value


def test_a_stranger_reads_all_and_changes_nothing(
    stranger: Caller, polkit: Polkit, things: dict[str, str], agent: AgentProcess
) -> None:
    polkit.answer = "no"
    shown = stranger.managed()
    assert set(things.values()) <= set(shown)
    assert stranger.call(ROOT, MANAGER, "GetJob", "s", shown[things[JOB]][JOB]["Id"]) == things[JOB]
    before = agent.job(shown[things[JOB]][JOB]["Id"])
    for name, member, signature, body, action in CHANGING:
        polkit.asked.clear()
        error = refusal(stranger, things.get(name, ROOT), name, member, signature, *body)
        assert error.name == DENIED, (member, error)
        assert f"org.hostagent1.{action}" in error.message
        ((subject, asked, details, flags, _, sender),) = polkit.asked
        assert (subject, asked, details) == (
            ["system-bus-name", {"name": stranger.name}],
            f"org.hostagent1.{action}",
            {},
        )
        assert (flags, sender.startswith(":")) == (0, True)
    assert agent.job(before["id"])["revision"] == before["revision"]
    assert agent.get(f"/v1/exports/{shown[things[EXPORT]][EXPORT]['Id']}")["state"] == "running"


def test_every_changing_method_is_in_this_list() -> None:
    from hostagent.api.projection.verbs import VERBS

    assert {(name, member) for name, member, *_ in CHANGING} == {key for key, verb in VERBS.items() if verb.action}


def test_whom_polkit_lets_may_do_what_the_use_cases_let_him(
    stranger: Caller, polkit: Polkit, things: dict[str, str]
) -> None:
    """An image outside the pools is root's to name, whoever asks."""
    stranger.call(things[JOB], JOB, "Next", "a{sv}", {})
    error = refusal(stranger, ROOT, MANAGER, "StartExport", "sa{sv}", "/tmp/elsewhere.qcow2", {})
    assert error.name in ("org.hostagent1.Error.OutsidePools", DENIED)
    assert [asked[1] for asked in polkit.asked] == ["org.hostagent1.job-control", "org.hostagent1.export"]


@pytest.mark.parametrize("answer", ["challenge", "error", "nonsense"])
def test_anything_but_yes_is_no(stranger: Caller, polkit: Polkit, things: dict[str, str], answer: str) -> None:
    polkit.answer = answer
    assert refusal(stranger, things[JOB], JOB, "Pause", "a{sv}", {}).name == DENIED


def test_a_caller_says_whether_he_may_be_asked_for_a_password(
    stranger: Caller, polkit: Polkit, things: dict[str, str]
) -> None:
    polkit.answer = "challenge"
    assert "password" in refusal(stranger, things[JOB], JOB, "Pause", "a{sv}", {}).message
    refusal(stranger, things[JOB], JOB, "Pause", "a{sv}", {}, flags=INTERACTIVE)
    assert [asked[3] for asked in polkit.asked] == [0, 1]


def test_polkit_that_hangs_is_a_no_in_its_time(
    stranger: Caller, caller: Caller, polkit: Polkit, things: dict[str, str], agent: AgentProcess
) -> None:
    polkit.answer = "silence"
    began = time.monotonic()
    error = refusal(stranger, things[JOB], JOB, "Pause", "a{sv}", {})
    assert error.name == DENIED
    assert "dbus.polkit_timeout" in error.message
    assert 0.9 < time.monotonic() - began < 10
    until(lambda: polkit.cancelled == 1, "it is told that nobody waits")
    assert caller.get(things[JOB], JOB, "State") == "waiting"


def test_without_polkit_root_alone_changes_anything(stranger: Caller, things: dict[str, str]) -> None:
    error = refusal(stranger, things[JOB], JOB, "Pause", "a{sv}", {})
    assert (error.name, "polkit" in error.message) == (DENIED, True)


def test_strangers_who_wait_for_polkit_keep_root_from_nothing(
    bus: PrivateBus, caller: Caller, polkit: Polkit, things: dict[str, str], agent: AgentProcess
) -> None:
    """And one of them has no more than his share."""
    polkit.answer = "silence"
    call = Message(Kind.CALL, things[JOB], JOB, "Pause", "a{sv}", ({},), destination=NAME)
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(Caller(bus.socket, NOBODY)) for _ in range(6)]
        serials = [(one, one.send(call)) for one in crowd for _ in range(20)]
        until(lambda: len(polkit.asked) >= 60, "polkit is asked")
        caller.call(things[JOB], JOB, "SetBandwidth", "ta{sv}", MIB, {})
        names = [refused(one, serial) for one, serial in serials]
    assert set(names) == {DENIED, "org.freedesktop.DBus.Error.LimitsExceeded"}
    assert names.count(DENIED) == len(polkit.asked)


def refused(caller: Caller, serial: int) -> str:
    with pytest.raises(BusError) as told:
        caller.answer(serial)
    return told.value.name


def test_who_leaves_while_polkit_thinks_is_nobody(
    bus: PrivateBus, caller: Caller, polkit: Polkit, things: dict[str, str], agent: AgentProcess
) -> None:
    polkit.answer = "silence"
    with Caller(bus.socket, NOBODY) as gone:
        gone.send(Message(Kind.CALL, things[JOB], JOB, "Cancel", "a{sv}", ({},), destination=NAME))
        until(lambda: polkit.asked, "polkit was asked")
    until(lambda: polkit.cancelled == 1, "it was given up")
    assert caller.get(things[JOB], JOB, "State") == "waiting"


def test_an_agent_that_stops_answers_who_still_waits(tmp_path: Path) -> None:
    """And does not wait for polkit itself."""
    home = tmp_path / "own"
    home.mkdir()
    with reachable(home), PrivateBus(home) as own:
        silent = Polkit(own.socket)
        silent.answer = "silence"
        settings = {**SETTINGS, "DBUS_POLKIT_TIMEOUT": "60", "DBUS_ADDRESS": own.address}
        with AgentProcess(tmp_path, settings) as agent, Caller(own.socket, NOBODY) as one:
            on_the_bus(agent)
            serial = one.send(Message(Kind.CALL, ROOT, MANAGER, "StartExport", "sa{sv}", ("/a", {}), destination=NAME))
            until(lambda: silent.asked, "polkit was asked")
            assert agent.stop() == 0
            with pytest.raises(BusError) as told:
                one.answer(serial)
            assert told.value.name == "org.hostagent1.Error.Cancelled"
        silent.close()
