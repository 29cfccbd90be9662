"""Jobs, exports and grants as a program on the host sees and moves them: over D-Bus alone, with real storage daemons."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import pytest

from hostagent.api.projection import objects
from hostagent.api.projection.message import BusError, Variant
from tests.dbus.bus import Caller, until
from tests.harness import MIB, AgentProcess, overlay, raw_image, same_content

pytestmark = pytest.mark.qemu

MANAGER, JOB, EXPORT, GRANT = (f"org.hostagent1.{noun}" for noun in ("Manager", "Job", "Export", "Grant"))
ROOT = "/org/hostagent1"
SIZE = 4 * MIB
SLOW = Variant("t", 64 * 1024)
"""Bytes per second at which a pull does not end while a test looks at it."""


@pytest.fixture
def top(folder: Path) -> Path:
    return overlay(folder / "top.qcow2", raw_image(folder / "base.raw", SIZE))


def start(caller: Caller, target: Path, **options: Variant) -> str:
    path: str = caller.call(ROOT, MANAGER, "StartJob", "ssa{sv}", "pull", str(target), options)
    return path


def deleted(caller: Caller, path: str) -> bool:
    try:
        caller.call(path, JOB, "Delete", "a{sv}", {})
    except BusError as error:
        if error.name != "org.hostagent1.Error.Conflict":
            raise
        return False
    return True


def test_a_pull_is_started_followed_and_completed(caller: Caller, agent: AgentProcess, top: Path) -> None:
    truth = top.with_name("truth.raw")
    truth.write_bytes((top.parent / "base.raw").read_bytes())
    id = str(uuid.uuid4())
    options = {"id": Variant("s", id), "bandwidth": Variant("t", 2 * MIB), "labels": Variant("a{ss}", {"for": "me"})}
    path = start(caller, top, **options)
    assert path == f"{ROOT}/job/{id.replace('-', '_')}"

    added = caller.heard("InterfacesAdded", lambda m: m.body[0] == path)
    assert added.path == "/"
    first = added.body[1][JOB]
    assert (first["Operation"], first["Target"], first["Id"]) == ("pull", str(top), id)
    assert (first["Bytes"], first["Cancelable"], first["Labels"]) == (SIZE, True, {"for": "me"})
    assert caller.heard("JobNew").body == (id, path)

    seen, cursors = dict(first), [first["Cursor"][0]]
    while seen["State"] != "completed":
        changes = caller.heard("PropertiesChanged", lambda m: m.path == path).body
        assert changes[0] == JOB
        seen.update(changes[1])
        cursors.append(seen["Cursor"][0])
    assert cursors == sorted(cursors)
    assert cursors[-1] == SIZE
    assert caller.heard("Completed", lambda m: m.path == path).body == (True, "")
    assert caller.heard("JobRemoved").body == (id, path, str(top), "completed")

    assert same_content(top, truth, running=True)
    job = agent.until_ended(id)
    last = until(lambda: (found := caller.get_all(path, JOB))["Revocation"] != "pending" and found, "it is settled")
    assert (last["Progress"], last["ProgressValid"], last["Cancelable"]) == (1.0, True, False)
    assert last["Finished"] == objects.micros(job["finished"])
    assert last["Chain"] == job["chain"]["after"] == [str(top)]
    assert (last["Revocation"], last["Revision"]) == (job["revocation"], job["revision"])


def test_progress_comes_once_a_second_whatever_the_agent_reads(caller: Caller, agent: AgentProcess, top: Path) -> None:
    """The cursor is read ten times a second."""
    path = start(caller, top, bandwidth=Variant("t", MIB))
    until(lambda: caller.get(path, JOB, "State") == "running", "it runs")
    caller.signals.clear()
    began, first, told = time.monotonic(), agent.job(caller.get(path, JOB, "Id"))["revision"], 0
    while True:
        changes = caller.heard("PropertiesChanged", lambda m: m.path == path).body[1]
        if changes.get("State", "running") != "running":
            break
        told += 1
    seconds = time.monotonic() - began
    assert 0 < told <= seconds + 2
    assert changes["Revision"] - first > 2 * told
    caller.heard("JobRemoved", lambda m: m.body[1] == path)


def test_a_job_is_paused_steered_and_cancelled(caller: Caller, agent: AgentProcess, top: Path) -> None:
    path = start(caller, top, bandwidth=SLOW)
    id = caller.get(path, JOB, "Id")
    until(lambda: caller.get(path, JOB, "State") == "running", "it runs")
    caller.call(path, JOB, "Pause", "a{sv}", {})
    until(lambda: caller.get(path, JOB, "State") == "paused", "it is paused")
    caller.call(path, JOB, "SetBandwidth", "ta{sv}", 128 * 1024, {})
    until(lambda: caller.get(path, JOB, "Bandwidth") == 128 * 1024, "it has another limit")
    caller.call(path, JOB, "Resume", "a{sv}", {})
    until(lambda: caller.get(path, JOB, "State") == "running", "it runs again")
    caller.call(path, JOB, "Cancel", "a{sv}", {"auth.no_user_interaction": Variant("b", True)})
    assert caller.heard("Completed", lambda m: m.path == path).body == (False, "the job was aborted")
    assert caller.heard("JobRemoved", lambda m: m.body[0] == id).body[3] == "aborted"
    agent.until_ended(id)
    assert caller.call(ROOT, MANAGER, "GetJob", "s", id) == path
    until(lambda: deleted(caller, path), "what it had open is closed, and it can be forgotten")
    assert caller.heard("InterfacesRemoved", lambda m: m.body[0] == path).body[1] == [JOB]
    with pytest.raises(BusError) as gone:
        caller.get_all(path, JOB)
    assert gone.value.name == "org.freedesktop.DBus.Error.UnknownObject"
    with pytest.raises(BusError) as unknown:
        caller.call(ROOT, MANAGER, "GetJob", "s", id)
    assert unknown.value.name == "org.hostagent1.Error.NotFound"


def test_an_incremental_pull_waits_for_next(caller: Caller, agent: AgentProcess, top: Path) -> None:
    path = start(caller, top, increment=Variant("t", MIB))
    id = caller.get(path, JOB, "Id")
    for _ in range(10):
        until(lambda: caller.get(path, JOB, "State") in ("waiting", "completed"), "the step is done")
        if caller.get(path, JOB, "State") == "completed":
            break
        caller.call(path, JOB, "Next", "a{sv}", {"cursor": Variant("t", caller.get(path, JOB, "Cursor")[0])})
        until(lambda: caller.get(path, JOB, "State") != "waiting" or agent.job(id)["state"] == "waiting", "it goes on")
    assert agent.until_ended(id)["state"] == "completed"


def test_an_export_comes_names_its_job_and_goes(caller: Caller, agent: AgentProcess, top: Path) -> None:
    path = caller.call(ROOT, MANAGER, "StartExport", "sa{sv}", str(top), {"labels": Variant("a{ss}", {"a": "b"})})
    shown = caller.heard("InterfacesAdded", lambda m: m.body[0] == path).body[1][EXPORT]
    assert (shown["State"], shown["Image"], shown["Writable"], shown["Size"]) == ("running", str(top), False, SIZE)
    assert shown["Uri"] == agent.get(f"/v1/exports/{shown['Id']}")["uri"]

    job = start(caller, top, bandwidth=SLOW)
    assert caller.get(job, JOB, "Objects") == [path]
    until(lambda: str(top) in {o[GRANT]["Path"] for o in caller.managed().values() if GRANT in o}, "its grant is shown")

    caller.call(job, JOB, "Cancel", "a{sv}", {})
    agent.until_ended(caller.get(job, JOB, "Id"))
    caller.call(path, EXPORT, "Stop", "a{sv}", {})
    assert caller.heard("PropertiesChanged", lambda m: m.path == path).body[1]["State"] == "stopped"
    assert caller.heard("InterfacesRemoved", lambda m: m.body[0] == path).body[1] == [EXPORT]
    assert path not in caller.managed()


def test_what_is_started_over_rest_is_shown_as_well(caller: Caller, agent: AgentProcess, top: Path) -> None:
    job = agent.pull(top, labels={"odd": "a \0 is no text"})
    path = caller.heard("JobNew", lambda m: m.body[0] == job["id"]).body[1]
    assert caller.get(path, JOB, "StartedByUID") == 2**32 - 1
    assert caller.get(path, JOB, "Labels") == {"odd": r"a \x00 is no text"}
    caller.heard("JobRemoved", lambda m: m.body[0] == job["id"])
    assert agent.until_ended(job["id"])["state"] == "completed"


def test_the_same_request_again_is_the_same_job(caller: Caller, agent: AgentProcess, top: Path) -> None:
    id = Variant("s", str(uuid.uuid4()))
    assert start(caller, top, id=id) == start(caller, top, id=id)
    with pytest.raises(BusError) as other:
        start(caller, top, id=id, bandwidth=SLOW)
    assert other.value.name == "org.hostagent1.Error.Conflict"
    agent.until_ended(id.value)


@pytest.mark.parametrize(
    ("operation", "target", "options", "name", "says"),
    [
        ("push", "/a", {}, "Invalid", "operation"),
        ("pull", "", {}, "Invalid", "target"),
        ("pull", "/nowhere/a.qcow2", {}, "NotFound", "/nowhere/a.qcow2"),
        ("pull", "/a", {"incremnt": Variant("t", 1)}, "Invalid", "did you mean increment?"),
        ("pull", "/a", {"increment": Variant("s", "64M")}, "Invalid", "increment"),
        ("pull", "/a", {"increment": Variant("i", -1)}, "Invalid", "increment"),
        ("pull", "/a", {"target": Variant("s", "/b")}, "Invalid", "target is an argument"),
        ("pull", "/a", {"dry_run": Variant("b", True)}, "Invalid", "dry_run"),
    ],
)
def test_an_error_has_a_name_and_says_what_to_do(
    caller: Caller, operation: str, target: str, options: dict[str, Variant], name: str, says: str
) -> None:
    with pytest.raises(BusError) as refused:
        caller.call(ROOT, MANAGER, "StartJob", "ssa{sv}", operation, target, options)
    assert refused.value.name == f"org.hostagent1.Error.{name}"
    assert says in refused.value.message
    assert "Traceback" not in refused.value.message


@pytest.mark.parametrize(
    ("path", "interface", "member", "signature", "body", "name"),
    [
        (f"{ROOT}/job/none", JOB, "Pause", "a{sv}", ({},), "UnknownObject"),
        ("/elsewhere", "", "Ping", "", (), "UnknownObject"),
        (ROOT, JOB, "Pause", "a{sv}", ({},), "UnknownInterface"),
        (ROOT, MANAGER, "Destroy", "", (), "UnknownMethod"),
        (ROOT, MANAGER, "StartJob", "s", ("pull",), "InvalidArgs"),
        (ROOT, "org.freedesktop.DBus.Properties", "Get", "ss", (MANAGER, "Nothing"), "UnknownProperty"),
        (ROOT, "org.freedesktop.DBus.Properties", "GetAll", "s", (JOB,), "UnknownInterface"),
        (
            ROOT,
            "org.freedesktop.DBus.Properties",
            "Set",
            "ssv",
            (MANAGER, "Version", Variant("s", "2")),
            "PropertyReadOnly",
        ),
    ],
)
def test_what_is_no_call_of_ours_is_refused_by_the_protocols_own_names(
    caller: Caller, path: str, interface: str, member: str, signature: str, body: tuple[object, ...], name: str
) -> None:
    with pytest.raises(BusError) as refused:
        caller.call(path, interface, member, signature, *body)
    assert refused.value.name == f"org.freedesktop.DBus.Error.{name}"
