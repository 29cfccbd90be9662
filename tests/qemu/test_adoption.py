"""An agent that comes back: what runs is taken up as it is, what ended meanwhile is told, what is nobody's is found.

Each test stops or kills a real agent, changes something while it is away, and starts it again on the same folders.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostagent.drivers import process
from tests.harness import (
    MIB,
    AgentProcess,
    ApiError,
    Json,
    backing_of,
    check_clean,
    overlay,
    raw_image,
    reachable,
    same_content,
    sound,
    user_can_read,
)
from tests.qemu.faults import PATIENCE, Pair, Reader, eventually, permissions, send, storage_daemons

pytestmark = pytest.mark.qemu

ROOT = os.geteuid() == 0
SIZE = 16 * MIB
SETTINGS = {"JOBS_PROGRESS_INTERVAL": "0.05", "JOBS_SETTLE_RETRY": "0.1", "QSD_STOP_TIMEOUT": "5", "METRICS_REFRESH": "0.2"}
REVOKED = "done" if ROOT else "kept"


class Shared:
    """One agent for many tests, as long as each leaves it as it was; a start takes most of a second."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._agent: AgentProcess | None = None

    def take(self) -> AgentProcess:
        if self._agent is None:
            home = self._factory.mktemp("agent")
            with reachable(home):
                self._agent = AgentProcess(home, SETTINGS)
            self._agent.start()
        return self._agent

    def give_back(self) -> None:
        assert self._agent is not None
        if not _idle(self._agent):
            self.close()

    def close(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None


def _idle(agent: AgentProcess) -> bool:
    if agent.process is None or agent.process.poll() is not None:
        return False
    host = agent.get("/v1/host")
    active = [item for item in agent.get("/v1/jobs")["items"] if item["finished"] is None]
    return not (active or host["storage_daemons"] or host["orphans"] or storage_daemons(agent))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    them = Shared(tmp_path_factory)
    yield them
    them.close()


@pytest.fixture
def agent(shared: Shared) -> Iterator[AgentProcess]:
    yield shared.take()
    shared.give_back()


def stop(agent: AgentProcess) -> None:
    assert agent.stop() == 0


def kill(agent: AgentProcess) -> None:
    agent.kill()


WAYS = [pytest.param(stop, id="sigterm"), pytest.param(kill, id="sigkill")]


@contextlib.contextmanager
def store(agent: AgentProcess) -> Iterator[sqlite3.Connection]:
    """The agent's store, while it is away."""
    assert agent.process is None
    with contextlib.closing(sqlite3.connect(agent.state / "hostagent.db")) as db:
        yield db
        db.commit()


def edit(agent: AgentProcess, table: str, change: Callable[[Json], None]) -> None:
    """Change the bodies of all rows of a table."""
    with store(agent) as db:
        for key, body in db.execute(f"SELECT rowid, body FROM {table}").fetchall():
            value = json.loads(body)
            change(value)
            db.execute(f"UPDATE {table} SET body=? WHERE rowid=?", (json.dumps(value), key))


def drive(agent: AgentProcess, job: Json) -> Json:
    """The job at its end, by `next` where it waits for that."""
    while True:
        job = agent.until(job["id"], lambda j: j["state"] in ("waiting", "completed", "failed", "aborted"))
        if job["state"] != "waiting":
            return agent.until_ended(job["id"])
        agent.post(f"/v1/jobs/{job['id']}/next", {"cursor": job["cursor"]["cur"]})


def end_export(agent: AgentProcess, export: Json) -> None:
    path = f"/v1/exports/{export['id']}"
    assert eventually(lambda: not agent.get(path)["clients"])
    assert agent.delete(path)["state"] == "stopped"


def told(agent: AgentProcess, subject: str) -> list[str]:
    """The kinds of the events about a subject."""
    return [e["type"].split(".")[3] for e in agent.events() if e["subject"] == subject]


def assert_all_gone(agent: AgentProcess, before: dict[Path, Any]) -> None:
    """No daemon, file, lock or grant is left; modes and ACLs are as they were."""
    assert eventually(lambda: storage_daemons(agent) == [])
    assert eventually(
        lambda: not list((agent.runtime / "qsd").iterdir()) and not list((agent.runtime / "nbd").iterdir())
    )
    assert eventually(lambda: {path: permissions(path) for path in before} == before)
    host = agent.get("/v1/host")
    assert (host["storage_daemons"], host["orphans"], host["revocations"]["pending"]) == ([], [], 0)
    for path in before:
        format = "raw" if path.suffix == ".raw" else "qcow2"
        done = subprocess.run(["qemu-io", "-f", format, "-c", "read 0 512", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# What runs goes on


@pytest.mark.parametrize(
    ("spec", "away"),
    [
        pytest.param({}, stop, id="continuous-sigterm"),
        pytest.param({}, kill, id="continuous-sigkill"),
        pytest.param({"increment": 16 * MIB}, kill, id="incremental-sigkill"),
    ],
)
def test_jobs_and_exports_go_on_over_a_restart_and_their_clients_never_notice(
    agent: AgentProcess, folder: Path, spec: Json, away: Callable[[AgentProcess], None]
) -> None:
    images = Pair(folder / "pair", 64 * MIB)  # what the client reads is copied up too: it must not be done too soon
    before = {path: permissions(path) for path in (images.top, images.base)}
    export = agent.export(images.top, ttl=600)
    with Reader(export["uri"], images.truth) as reader:
        job = agent.pull(images.top, bandwidth=4 * MIB, **spec)
        seen = agent.until(job["id"], lambda j: j["cursor"]["cur"] > 0)
        away(agent)
        assert storage_daemons(agent) == [export["pid"]]
        agent.start()
        job = agent.job(job["id"])
        assert job["state"] in ("running", "waiting")
        assert job["cursor"]["cur"] >= seen["cursor"]["cur"] or "increment" not in spec
        again = agent.get(f"/v1/exports/{export['id']}")
        changing = ("clients", "revision")
        assert {k: v for k, v in again.items() if k not in changing} == {
            k: v for k, v in export.items() if k not in changing
        }
        assert [client["pid"] for client in again["clients"]] == [reader.process.pid]
        agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
        job = drive(agent, job)
        assert (job["state"], job["revocation"]) == ("completed", REVOKED), job
        if ROOT:
            assert not user_can_read(images.base, str(agent.user))
        assert reader.stop() > 0
    assert told(agent, job["id"]) == ["started", "completed"]
    end_export(agent, export)
    assert told(agent, export["id"]) == ["started", "stopped"]
    assert backing_of(images.top) is None
    assert check_clean(images.top)
    assert same_content(images.top, images.truth)
    assert_all_gone(agent, before)


def test_a_job_without_an_export_goes_on_while_the_agent_is_away_and_is_completed_when_it_is_back(
    agent: AgentProcess, images: Pair
) -> None:
    before = {path: permissions(path) for path in (images.top, images.base)}
    job = agent.pull(images.top, bandwidth=24 * MIB)
    agent.until(job["id"], lambda j: j["cursor"]["cur"] > 0)
    agent.kill()
    time.sleep(1)  # it has copied everything, and waits to be finalized
    assert backing_of(images.top) == images.base.name
    agent.start()
    job = agent.until_ended(job["id"])
    assert (job["state"], job["revocation"]) == ("completed", REVOKED), job
    assert told(agent, job["id"]) == ["started", "completed"]
    assert check_clean(images.top)
    assert same_content(images.top, images.truth)
    assert_all_gone(agent, before)


@pytest.mark.parametrize("away", WAYS)
def test_a_waiting_job_waits_on_over_a_restart_with_its_cursor(
    agent: AgentProcess, images: Pair, away: Callable[[AgentProcess], None]
) -> None:
    before = {path: permissions(path) for path in (images.top, images.base)}
    job = agent.pull(images.top, increment=4 * MIB, labels={"kept": "yes"})
    waiting = agent.until(job["id"], lambda j: j["state"] == "waiting")
    away(agent)
    assert storage_daemons(agent) == []
    agent.start()
    again = agent.job(job["id"])
    assert {k: again[k] for k in ("state", "cursor", "labels", "chain", "created")} == {
        k: waiting[k] for k in ("state", "cursor", "labels", "chain", "created")
    }
    assert agent.post(f"/v1/jobs/{job['id']}/next", {"cursor": 0})["cursor"]["cur"] == 4 * MIB
    assert drive(agent, again)["state"] == "completed"
    assert same_content(images.top, images.truth)
    assert_all_gone(agent, before)


@pytest.mark.parametrize(
    "spec", [pytest.param({}, id="continuous"), pytest.param({"increment": SIZE}, id="incremental")]
)
def test_a_paused_job_is_still_paused_after_a_restart(agent: AgentProcess, images: Pair, spec: Json) -> None:
    job = agent.pull(images.top, bandwidth=4 * MIB, **spec)
    agent.until(job["id"], lambda j: j["cursor"]["cur"] > 0)
    agent.post(f"/v1/jobs/{job['id']}/pause")
    agent.kill()
    agent.start()
    cursor = agent.job(job["id"])["cursor"]
    time.sleep(0.3)
    job = agent.job(job["id"])
    assert (job["state"], job["cursor"]) == ("paused", cursor)
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    agent.post(f"/v1/jobs/{job['id']}/resume")
    assert drive(agent, job)["state"] == "completed"
    assert same_content(images.top, images.truth)


def test_queued_jobs_and_ended_ones_are_there_after_a_restart(tmp_path: Path, folder: Path) -> None:
    base = raw_image(folder / "base.raw", 8 * MIB)
    tops = [overlay(folder / f"top{n}.qcow2", base) for n in range(3)]
    with AgentProcess(tmp_path, {**SETTINGS, "JOBS_WIDTH": "1"}) as agent:
        done = agent.until_ended(agent.pull(tops[0])["id"])
        running, queued = agent.pull(tops[1], bandwidth=MIB // 8), agent.pull(tops[2])
        agent.until(running["id"], lambda j: j["cursor"]["cur"] > 0)
        agent.kill()
        agent.start()
        assert agent.job(done["id"])["finished"] == done["finished"]
        assert agent.job(queued["id"])["state"] == "queued"
        agent.patch(f"/v1/jobs/{running['id']}", {"bandwidth": 0})
        for job in (running, queued):
            assert agent.until_ended(job["id"])["state"] == "completed"
        ids = [item["id"] for item in agent.get("/v1/jobs")["items"]]
        assert ids == [queued["id"], running["id"], done["id"]]
        assert all(same_content(top, base) for top in tops)


def test_an_exports_time_to_live_runs_on_while_the_agent_is_away(agent: AgentProcess, images: Pair) -> None:
    before = {path: permissions(path) for path in (images.top, images.base)}
    export = agent.export(images.top, ttl=1.0)
    agent.kill()
    time.sleep(1.0)
    assert alive(export["pid"]), "without an agent nobody ends it"
    agent.start()
    assert eventually(lambda: agent.get(f"/v1/exports/{export['id']}")["state"] == "stopped")
    assert "time to live" in agent.get(f"/v1/exports/{export['id']}")["reason"]
    assert_all_gone(agent, before)


def test_an_adopted_export_takes_new_clients_and_the_pull_that_comes_after(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top)
    for _ in range(2):
        agent.kill()
        agent.start()
    with Reader(export["uri"], images.truth) as reader:
        second = agent.export(images.top)
        assert second["pid"] == export["pid"]
        job = agent.until_ended(agent.pull(images.top)["id"])
        assert (job["state"], job["revocation"]) == ("completed", REVOKED)
        assert reader.stop() > 0
    end_export(agent, second)
    end_export(agent, export)
    assert not alive(export["pid"])
    assert same_content(images.top, images.truth)


def test_an_adopted_chain_is_leased_again(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top)
    agent.kill()
    agent.start()
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", str(images.base)], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "lock" in done.stderr
    end_export(agent, export)


# What ended meanwhile


def test_a_storage_daemon_that_died_while_the_agent_was_away_is_told_and_the_image_is_whole(
    agent: AgentProcess, images: Pair
) -> None:
    before = {path: permissions(path) for path in (images.top, images.base)}
    export = agent.export(images.top)
    job = agent.pull(images.top, bandwidth=8 * MIB)
    agent.until(job["id"], lambda j: j["cursor"]["cur"] > 0)
    agent.kill()
    send(signal.SIGKILL, export["pid"])
    assert eventually(lambda: not alive(export["pid"]))
    agent.start()
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "storage_daemon_died")
    assert job["error"]["remedy"]
    assert job["chain"]["after"] == job["chain"]["before"]
    lost = agent.get(f"/v1/exports/{export['id']}")
    assert (lost["state"], lost["clients"]) == ("lost", [])
    assert told(agent, export["id"]) == ["started", "lost"]
    assert told(agent, job["id"]) == ["started", "failed"]
    assert not Path(export["socket"]).exists()
    assert backing_of(images.top) == images.base.name
    assert sound(images.top)
    assert same_content(images.top, images.truth)
    holders = [g["holder"] for g in agent.get("/v1/grants")["items"] if g["path"] == str(images.base)]
    assert holders == [{"kind": "image", "id": str(images.top)}], "the image still stands on its base"
    again = agent.until_ended(agent.pull(images.top)["id"])
    assert (again["state"], again["revocation"]) == ("completed", REVOKED)
    assert same_content(images.top, images.truth)
    assert_all_gone(agent, before)


def test_a_pull_that_somebody_else_finished_meanwhile_is_completed_by_the_headers_proof(
    agent: AgentProcess, images: Pair
) -> None:
    before = {path: permissions(path) for path in (images.top, images.base)}
    job = agent.pull(images.top, increment=4 * MIB)
    agent.until(job["id"], lambda j: j["state"] == "waiting")
    agent.kill()
    subprocess.run(["qemu-img", "rebase", "-b", "", str(images.top)], check=True)
    agent.start()
    assert agent.job(job["id"])["state"] in ("waiting", "completed")
    job = drive(agent, agent.job(job["id"]))
    assert (job["state"], job["revocation"]) == ("completed", REVOKED), job
    assert same_content(images.top, images.truth)
    assert_all_gone(agent, before)


def test_a_process_that_has_the_number_of_a_daemon_of_before_is_left_alone(agent: AgentProcess, images: Pair) -> None:
    before = {path: permissions(path) for path in (images.top, images.base)}
    export = agent.export(images.top)
    agent.kill()
    send(signal.SIGKILL, export["pid"])
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        edit(agent, "daemons", lambda body: body.update(pid=bystander.pid))
        edit(agent, "exports", lambda body: body.update(pid=bystander.pid))
        agent.start()
        assert agent.get(f"/v1/exports/{export['id']}")["state"] == "lost"
        assert bystander.poll() is None
        assert_all_gone(agent, before)
        stop(agent)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait(PATIENCE)


def test_after_a_reboot_exports_are_lost_and_what_was_given_is_taken_back_under_new_device_numbers(
    agent: AgentProcess, images: Pair
) -> None:
    before = {path: permissions(path) for path in (images.top, images.base)}
    export = agent.export(images.top)
    agent.kill()
    send(signal.SIGKILL, export["pid"])
    _reboot(agent)
    agent.start()
    lost = agent.get(f"/v1/exports/{export['id']}")
    assert lost["state"] == "lost"
    assert_all_gone(agent, before)
    end_export(agent, agent.export(images.top))
    assert_all_gone(agent, before)


def test_a_waiting_job_goes_on_after_a_reboot_that_gave_its_disk_another_number(
    agent: AgentProcess, images: Pair
) -> None:
    before = {path: permissions(path) for path in (images.top, images.base)}
    job = agent.pull(images.top, increment=4 * MIB)
    agent.until(job["id"], lambda j: j["state"] == "waiting")
    agent.kill()
    _reboot(agent)
    agent.start()
    job = drive(agent, agent.job(job["id"]))
    assert (job["state"], job["revocation"]) == ("completed", REVOKED), job
    assert same_content(images.top, images.truth)
    assert_all_gone(agent, before)


def _reboot(agent: AgentProcess) -> None:
    """What another boot leaves: another boot id, no sockets, and file systems with other device numbers."""
    for path in (agent.runtime / "qsd").glob("*/*"):
        path.unlink()
    for folder in (agent.runtime / "qsd").glob("*"):
        folder.rmdir()
    for path in (agent.runtime / "nbd").glob("*"):
        path.unlink()
    with store(agent) as db:
        for table in ("access_rows", "access_files"):
            db.execute(f"UPDATE {table} SET dev = dev + 1000")
        db.execute("UPDATE facts SET value='00000000-0000-0000-0000-000000000000' WHERE name='boot_id'")

    def elsewhere(body: Any) -> None:
        """Every [device, inode] in a stored record."""
        for key, value in body.items():
            if key == "file":
                body[key] = [value[0] + 1000, value[1]]
            elif isinstance(value, dict):
                elsewhere(value)
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, dict):
                        elsewhere(item)

    for table in ("access_files", "exports", "daemons", "jobs"):
        edit(agent, table, elsewhere)
    edit(agent, "daemons", lambda body: body.update(boot_id="00000000-0000-0000-0000-000000000000"))


# What is nobody's


def test_an_orphaned_storage_daemon_that_holds_nothing_is_ended(agent: AgentProcess, images: Pair) -> None:
    before = {path: permissions(path) for path in (images.top, images.base)}
    job = agent.pull(images.top, increment=SIZE, bandwidth=4 * MIB)
    agent.until(job["id"], lambda j: j["cursor"]["cur"] > 0)
    agent.post(f"/v1/jobs/{job['id']}/pause")
    (pid,) = storage_daemons(agent)
    agent.kill()
    with store(agent) as db:
        db.execute("DELETE FROM daemons")
    agent.start()
    assert eventually(lambda: not alive(pid))
    assert agent.get("/v1/host")["orphans"] == []
    agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    agent.post(f"/v1/jobs/{job['id']}/resume")
    assert drive(agent, job)["state"] == "completed"
    assert same_content(images.top, images.truth)
    assert_all_gone(agent, before)


def test_an_orphaned_storage_daemon_with_an_export_is_reported_and_left_to_its_clients(
    agent: AgentProcess, images: Pair
) -> None:
    export = agent.export(images.top)
    with Reader(export["uri"], images.truth) as reader:
        agent.kill()
        with store(agent) as db:
            db.execute("DELETE FROM daemons")
        agent.start()
        (orphan,) = agent.get("/v1/host")["orphans"]
        assert (orphan["pid"], orphan["exports"]) == (export["pid"], [export["id"]])
        shown = agent.call("GET", "/metrics")[2]
        assert 'hostagent_storage_daemons{state="orphan"} 1.0' in shown
        assert "hostagent_nbd_exports_orphaned 1.0" in shown
        assert alive(export["pid"])
        assert reader.stop() > 0
    assert agent.get(f"/v1/exports/{export['id']}")["state"] == "lost"
    if ROOT:
        assert eventually(lambda: agent.get("/v1/host")["revocations"]["pending"] == 0)
    send(signal.SIGTERM, export["pid"])
    assert eventually(lambda: not alive(export["pid"]))
    assert eventually(lambda: agent.get("/v1/host")["orphans"] == [])
    assert "hostagent_nbd_exports_orphaned 0.0" in agent.call("GET", "/metrics")[2]
    assert list((agent.runtime / "qsd").iterdir()) == []


def test_an_image_that_an_orphan_writes_is_busy_and_names_its_process(agent: AgentProcess, images: Pair) -> None:
    job = agent.pull(images.top, bandwidth=4 * MIB)
    agent.until(job["id"], lambda j: j["cursor"]["cur"] > 0)
    (pid,) = storage_daemons(agent)
    agent.kill()
    with store(agent) as db:
        db.execute("DELETE FROM daemons")
    agent.start()
    (orphan,) = agent.get("/v1/host")["orphans"]
    assert (orphan["pid"], orphan["exports"]) == (pid, [])
    assert f"pull-{job['id']}" in orphan["holds"]
    assert agent.until(job["id"], lambda j: j["state"] == "failed")["error"]["code"] == "storage_daemon_died"
    assert alive(pid)
    again = agent.until(agent.pull(images.top)["id"], lambda j: j["state"] == "failed")
    assert again["error"]["code"] == "busy", again
    assert f"pid {pid}" in again["error"]["message"]
    send(signal.SIGTERM, pid)
    assert eventually(lambda: not alive(pid))
    assert agent.until_ended(agent.pull(images.top)["id"])["state"] == "completed"
    assert same_content(images.top, images.truth)


def test_a_storage_daemon_of_another_agent_is_none_of_our_business(
    tmp_path: Path, images: Pair, agent: AgentProcess
) -> None:
    export = agent.export(images.top)
    other_home = tmp_path / "other"
    other_home.mkdir()
    with AgentProcess(other_home, SETTINGS) as other:
        assert other.get("/v1/host")["orphans"] == []
        error = _refused(other, {"operation": "pull", "target": str(images.top)})
        assert (error["state"], error["error"]["code"]) == ("failed", "busy"), error
    assert alive(export["pid"])
    assert agent.get(f"/v1/exports/{export['id']}")["state"] == "running"
    end_export(agent, export)


def _refused(agent: AgentProcess, request: Json) -> Json:
    job: Json = agent.until_ended(agent.post("/v1/jobs", request)["id"])
    return job


# Two agents, one place


def _second(agent: AgentProcess, state: Path, runtime: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hostagent.cli.main", "serve"]
    command += ["--state-dir", str(state), "--runtime-dir", str(runtime)]
    command += ["--hypervisor-user", agent.user] if agent.user else []
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_a_second_agent_on_the_same_state_folder_does_not_start_and_says_why(
    agent: AgentProcess, images: Pair, tmp_path: Path
) -> None:
    export = agent.export(images.top)
    done = _second(agent, agent.state, tmp_path / "run")
    assert done.returncode == 6
    assert str(agent.state) in done.stderr
    assert "Traceback" not in done.stderr
    done = _second(agent, agent.state, agent.runtime)
    assert done.returncode == 6
    assert agent.get("/healthz") == {"ok": True}
    assert agent.get(f"/v1/exports/{export['id']}")["state"] == "running"
    end_export(agent, export)


def test_a_second_agent_on_the_same_socket_does_not_start_and_harms_nobody(
    agent: AgentProcess, images: Pair, tmp_path: Path
) -> None:
    export = agent.export(images.top)
    with Reader(export["uri"], images.truth) as reader:
        done = _second(agent, tmp_path / "other-state", agent.runtime)
        assert done.returncode == 6
        assert str(agent.socket) in done.stderr
        assert agent.get("/healthz") == {"ok": True}
        assert alive(export["pid"])
        assert reader.stop() > 0
    end_export(agent, export)


def test_sockets_that_a_killed_agent_left_are_replaced(agent: AgentProcess, images: Pair) -> None:
    agent.kill()
    assert agent.socket.exists()
    with socket.socket(socket.AF_UNIX) as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(str(agent.socket))
    agent.start()
    export = agent.export(images.top)
    assert export["state"] == "running"
    end_export(agent, export)
    stop(agent)
    assert not agent.socket.exists()


def test_a_clean_stop_leaves_no_process_when_nothing_runs(agent: AgentProcess, images: Pair) -> None:
    assert agent.until_ended(agent.pull(images.top)["id"])["state"] == "completed"
    assert agent.process is not None
    group = os.getpgid(agent.process.pid)
    stop(agent)
    assert storage_daemons(agent) == []
    assert [pid for pid in _group(group) if alive(pid)] == []


def _group(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(int(entry.name)) == group:
                    found.append(int(entry.name))
    return found


def test_a_request_for_a_job_of_a_lost_store_is_not_found(agent: AgentProcess, images: Pair) -> None:
    job = agent.until_ended(agent.pull(images.top)["id"])
    stop(agent)
    for path in agent.state.glob("hostagent.db*"):
        path.unlink()
    agent.start()
    with pytest.raises(ApiError) as caught:
        agent.job(job["id"])
    assert caught.value.status == 404
    assert agent.get("/v1/jobs")["items"] == []


def test_a_storage_daemon_that_never_opened_its_chain_is_ended_and_its_job_goes_on(
    tmp_path: Path, folder: Path
) -> None:
    base = raw_image(folder / "base.raw", 16 * MIB)
    top = overlay(folder / "top.qcow2", base)
    with AgentProcess(tmp_path, {"JOBS_PROGRESS_INTERVAL": "0.1", "JOBS_SETTLE_RETRY": "0.1"}) as agent:
        job = agent.pull(top, increment=8 * MIB, bandwidth=2 * MIB)
        agent.until(job["id"], lambda now: now["state"] == "running" and agent.daemons() != [])
        (before,) = agent.daemons()
        agent.kill()
        os.kill(before, signal.SIGKILL)
        with sqlite3.connect(agent.state / "hostagent.db") as store:
            ((name, body),) = store.execute("SELECT id, body FROM daemons").fetchall()
            chardev = f"hostagent-{name}"
            monitor = agent.runtime / "qsd" / name / "qmp.sock"
            monitor.unlink(missing_ok=True)
            bare = subprocess.Popen(
                [
                    "qemu-storage-daemon",
                    "--chardev",
                    f"socket,id={chardev},path={monitor},server=on,wait=off",
                    "--monitor",
                    f"chardev={chardev}",
                ]
            )
            record = {**json.loads(body), "pid": bare.pid, "start_time": process.start_time(bare.pid)}
            store.execute("UPDATE daemons SET body=?", (json.dumps(record),))
        store.close()
        try:
            deadline = time.monotonic() + 5
            while not monitor.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            agent.start()
            assert bare.wait(5) == -signal.SIGKILL
        finally:
            bare.kill()
            bare.wait()
        agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
        agent.until(job["id"], lambda now: now["state"] == "waiting")
        agent.post(f"/v1/jobs/{job['id']}/next")
        assert agent.until_ended(job["id"])["state"] == "completed"
        assert same_content(top, base)
        assert sound(top)  # the first daemon was killed while it wrote
