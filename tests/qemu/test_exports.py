"""Exports through a real agent: who may connect, what clients see, and what an export's beginning and end touch."""

from __future__ import annotations

import grp
import importlib
import json
import os
import subprocess
import sys
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from tests.harness import (
    MIB,
    AgentProcess,
    ApiError,
    Json,
    backing_of,
    check_clean,
    overlay,
    raw_image,
    same_content,
    user_can_read,
)
from tests.qemu.faults import HASTE, PATIENCE, Pair, Reader, daemon_of, eventually, permissions

nbd: Any = importlib.import_module("nbd")

pytestmark = pytest.mark.qemu

ROOT = os.geteuid() == 0
SIZE = 16 * MIB
O_PATH = 0o10000000
REVOKED = "done" if ROOT else "kept"


class Client:
    """A process that is connected to an export and does nothing."""

    CODE = "import nbd, sys, time; h = nbd.NBD(); h.connect_uri(sys.argv[1]); print('in', flush=True); time.sleep(999)"

    def __init__(self, uri: str) -> None:
        command = [sys.executable, "-c", self.CODE, uri]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "in\n"

    @property
    def pid(self) -> int:
        return self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


class Hasty(Client):
    """A process that reads at random places without a pause, and ends when a read fails."""

    CODE = (
        "import nbd, random, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1]); print('in', flush=True)\n"
        "while True: h.pread(65536, random.randrange(0, h.get_size() - 65536, 512))"
    )

    def stop(self) -> None:
        """Fails when a read ever failed."""
        assert self.process.poll() is None, "a read failed"


def connected(uri: str) -> Any:
    client = nbd.NBD()
    client.add_meta_context("base:allocation")
    client.add_meta_context("qemu:allocation-depth")
    client.connect_uri(uri)
    return client


def content(uri: str) -> bytes:
    client = nbd.NBD()
    client.connect_uri(uri)
    data = b"".join(client.pread(MIB, n * MIB) for n in range(client.get_size() // MIB))
    client.shutdown()
    return data


def depths(uri: str) -> set[int]:
    """The allocation depths that an export tells of: 0 nowhere, 1 in the top, and so on."""
    command = ["nbdinfo", "--json", "--map=qemu:allocation-depth", uri]
    done = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE)
    return {extent["type"] for extent in json.loads(done.stdout)}


def show(agent: AgentProcess, export: Json) -> Json:
    found: Json = agent.get(f"/v1/exports/{export['id']}")
    return found


def stop(agent: AgentProcess, export: Json, *, force: bool = False) -> Json:
    """The stopped export; without force, once the daemon has seen its clients leave."""
    assert force or eventually(lambda: not show(agent, export)["clients"])
    stopped: Json = agent.delete(f"/v1/exports/{export['id']}{'?force=true' if force else ''}")
    assert stopped["state"] == "stopped"
    return stopped


def refusal(agent: AgentProcess, method: str, path: str, body: Json | None = None) -> ApiError:
    with pytest.raises(ApiError) as caught:
        agent._ok(method, path, body)
    return caught.value


def open_for_data(pid: int) -> set[tuple[int, int]]:
    """(device, inode) of the files that a process has open other than by O_PATH."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        flags = next(
            int(line.split()[1], 8)
            for line in Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().splitlines()
            if line.startswith("flags:")
        )
        if not flags & O_PATH:
            stat = entry.stat()
            found.add((stat.st_dev, stat.st_ino))
    return found


def identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# Clients


def test_an_export_serves_the_image_to_several_clients_at_once(agent: AgentProcess, images: Pair) -> None:
    before = {path: permissions(path) for path in (images.top, images.base)}
    export = agent.export(images.top, labels={"for": "backup"})
    assert (export["state"], export["size"], export["writable"]) == ("running", SIZE, False)
    assert export["labels"] == {"for": "backup"}
    copy = images.folder.parent / "copy.raw"
    with Reader(export["uri"], images.truth) as reader, Reader(export["uri"], images.truth) as other:
        subprocess.run(["nbdcopy", export["uri"], str(copy)], check=True, timeout=PATIENCE)
        info = json.loads(subprocess.run(["nbdinfo", "--json", export["uri"]], capture_output=True, check=True).stdout)[
            "exports"
        ][0]
        assert (info["export-name"], info["export-size"]) == (export["id"], SIZE)
        assert info["is_read_only"] is True
        assert info["can_multi_conn"] is True
        names = {client["pid"] for client in show(agent, export)["clients"]}
        assert {reader.process.pid, other.process.pid} <= names
        assert reader.stop() > 0
        assert other.stop() > 0
    assert copy.read_bytes() == images.truth.read_bytes()
    stopped = stop(agent, export)
    assert stopped["reason"] == "stopped by request"
    assert not alive(export["pid"])
    assert not Path(export["socket"]).exists()
    assert eventually(lambda: {path: permissions(path) for path in before} == before)
    assert_no_grants(agent, images)


def granted(agent: AgentProcess, images: Pair) -> set[str]:
    return {grant["path"] for grant in agent.get("/v1/grants")["items"]} & {str(images.top), str(images.base)}


def assert_no_grants(agent: AgentProcess, images: Pair) -> None:
    """As it must be when the answer to whoever ended it is there. What ends by itself is told first: `eventually`."""
    if ROOT:
        assert not granted(agent, images)


def test_its_storage_daemon_keeps_the_memory_of_its_buffers(agent: AgentProcess, images: Pair) -> None:
    agent.export(images.top)
    environment = Path(f"/proc/{daemon_of(agent, images.top)}/environ").read_bytes()
    assert b"GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4194304:glibc.malloc.trim_threshold=8388608" in environment.replace(b"\0", b":")


def test_an_export_is_served_when_the_request_returns(agent: AgentProcess, images: Pair) -> None:
    status, headers, export = agent.call("POST", "/v1/exports", {"image": str(images.top)})
    assert (status, headers["location"]) == (202, f"/v1/exports/{export['id']}")
    assert content(export["uri"]) == images.truth.read_bytes()
    stop(agent, export)


def test_an_export_tells_which_layer_has_the_data_and_shallow_shows_the_top_alone(
    agent: AgentProcess, images: Pair
) -> None:
    whole, shallow = agent.export(images.top), agent.export(images.top, shallow=True)
    assert depths(whole["uri"]) == {1, 2}
    assert depths(shallow["uri"]) == {0, 1}
    assert shallow["socket"] != whole["socket"]
    truth, top = images.truth.read_bytes(), connected(shallow["uri"])
    assert top.pread(4096, 0) == truth[:4096], "the first write of the overlay"
    assert top.pread(4096, MIB) == bytes(4096), "what only the base has is not there"
    top.shutdown()
    shallow = stop(agent, shallow)
    assert content(whole["uri"]) == truth
    stop(agent, whole)


def test_a_raw_image_is_exported_when_its_format_is_said_and_never_probed(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.base, format="raw")
    assert content(export["uri"]) == images.base.read_bytes()
    stop(agent, export)
    error = refusal(agent, "POST", "/v1/exports", {"image": str(images.base)})
    assert (error.code, error.body["field"]) == ("invalid", "format")
    export = agent.export(images.top, format="raw")
    assert content_length(export["uri"]) == images.top.stat().st_size
    stop(agent, export)


def content_length(uri: str) -> int:
    client = connected(uri)
    size = int(client.get_size())
    client.shutdown()
    return size


def test_a_client_cannot_write_trim_or_name_another_export(agent: AgentProcess, images: Pair) -> None:
    export, content_before = agent.export(images.top), images.top.read_bytes()
    client = connected(export["uri"])
    client.set_strict_mode(0)
    for attempt in (
        partial(client.pwrite, bytes(512), 0),
        partial(client.zero, 4096, 0),
        partial(client.trim, 4096, 0),
    ):
        with pytest.raises(nbd.Error):
            attempt()
    client.shutdown()
    for name in ("", "hostagent-control", "hostagent-reader", str(uuid.uuid4())):
        with pytest.raises(nbd.Error):
            nbd.NBD().connect_uri(f"nbd+unix:///{name}?socket={export['socket']}")
    stop(agent, export)
    assert images.top.read_bytes() == content_before


# Several exports


def test_a_second_export_of_an_image_joins_the_first_ones_listener_and_each_ends_alone(
    agent: AgentProcess, images: Pair
) -> None:
    first, second = agent.export(images.top), agent.export(images.top)
    assert first["id"] != second["id"]
    assert (first["socket"], first["pid"]) == (second["socket"], second["pid"])
    with Reader(second["uri"], images.truth) as reader:
        agent.delete(f"/v1/exports/{first['id']}")
        with pytest.raises(nbd.Error):
            connected(first["uri"])
        assert alive(second["pid"])
        assert reader.stop() > 0
    stop(agent, second)
    assert not alive(second["pid"])


def test_the_same_id_and_request_make_one_export(agent: AgentProcess, images: Pair) -> None:
    request = {"id": str(uuid.uuid4()), "image": str(images.top), "ttl": 600}
    export = agent.post("/v1/exports", request)
    status, _, again = agent.call("POST", "/v1/exports", request)
    assert (status, again["uri"]) == (200, export["uri"])
    error = refusal(agent, "POST", "/v1/exports", {**request, "shallow": True})
    assert (error.status, error.code, error.body["field"]) == (409, "conflict", "id")
    stop(agent, export)
    assert agent.post("/v1/exports", request)["state"] == "stopped", "an ended one is not started again"


def test_exports_are_listed_by_state_label_and_image(agent: AgentProcess, images: Pair) -> None:
    mark = uuid.uuid4().hex
    exports = [agent.export(images.top, labels={"test": mark, "n": str(n)}) for n in range(3)]
    stop(agent, exports[0])
    newest = [export["id"] for export in reversed(exports)]

    def ids(query: str) -> list[str]:
        return [item["id"] for item in agent.get(f"/v1/exports?{query}")["items"]]

    assert ids(f"label=test={mark}") == newest
    assert ids(f"label=test={mark}&state=running") == newest[:2]
    assert ids(f"label=n=1&target={images.top}") == [newest[1]]
    page = agent.get(f"/v1/exports?label=test={mark}&limit=2")
    assert [item["id"] for item in page["items"]] == newest[:2]
    page = agent.get(f"/v1/exports?label=test={mark}&limit=2&after={page['next']}")
    assert [item["id"] for item in page["items"]] == newest[2:]
    assert page["next"] is None
    for export in exports[1:]:
        stop(agent, export)


def test_exports_of_two_overlays_of_one_base_are_two_daemons(agent: AgentProcess, images: Pair) -> None:
    sibling = overlay(images.folder / "sibling.qcow2", images.base)
    first, second = agent.export(images.top), agent.export(sibling)
    assert first["pid"] != second["pid"]
    stop(agent, first)
    assert content(second["uri"]) == images.base.read_bytes()
    if ROOT:
        assert user_can_read(images.base, str(agent.user))
    stop(agent, second)
    assert_no_grants(agent, images)


# The end


def test_a_stop_is_refused_while_a_client_is_connected_and_names_it(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top)
    with Client(export["uri"]) as client:
        assert [(c["pid"], c["uid"]) for c in show(agent, export)["clients"]] == [(client.pid, os.geteuid())]
        error = refusal(agent, "DELETE", f"/v1/exports/{export['id']}")
        assert (error.status, error.code) == (409, "busy")
        assert f"pid {client.pid}" in error.body["detail"]
        assert "--force" in error.body["remedy"]
        assert show(agent, export)["state"] == "running"
        assert content(export["uri"]) == images.truth.read_bytes()
    stop(agent, export)


def test_a_forced_stop_cuts_the_clients_of_that_export_and_no_others(agent: AgentProcess, images: Pair) -> None:
    export, other = agent.export(images.top), agent.export(images.top)
    with Reader(export["uri"], images.truth) as cut, Reader(other["uri"], images.truth) as left:
        stop(agent, export, force=True)
        assert cut.cut_off()
        assert left.stop() > 0
    stop(agent, other)
    assert agent.delete(f"/v1/exports/{export['id']}")["state"] == "stopped", "a second stop is no error"
    assert refusal(agent, "DELETE", f"/v1/exports/{uuid.uuid4()}").status == 404


def test_an_export_ends_with_its_time_to_live_clients_or_not(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top, ttl=0.5)
    assert export["expires"] > export["created"]
    with Reader(export["uri"], images.truth) as reader:
        assert eventually(lambda: show(agent, export)["state"] == "stopped")
        assert reader.cut_off()
    ended = show(agent, export)
    assert "time to live" in ended["reason"]
    assert eventually(lambda: not alive(export["pid"]))
    assert eventually(lambda: not granted(agent, images))


def test_an_idle_timeout_counts_only_while_no_client_is_there(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top, idle_timeout=0.4)
    with Client(export["uri"]):
        time.sleep(0.9)
        assert show(agent, export)["state"] == "running"
    left = time.monotonic()
    assert eventually(lambda: show(agent, export)["state"] == "stopped")
    assert 0.2 < time.monotonic() - left < 3
    assert "no client" in show(agent, export)["reason"]


def test_a_long_poll_tells_that_an_export_ended(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top, ttl=0.4)
    _, headers, _ = agent.call("GET", f"/v1/exports/{export['id']}")
    began = time.monotonic()
    status, _, ended = agent.call(
        "GET", f"/v1/exports/{export['id']}?wait=20", headers={"If-None-Match": headers["etag"]}
    )
    assert (status, ended["state"]) == (200, "stopped")
    assert time.monotonic() - began < 5


def test_the_events_and_metrics_tell_of_an_export(agent: AgentProcess, images: Pair) -> None:
    exports, daemons = 'hostagent_nbd_exports{mode="ro"}', 'hostagent_storage_daemons{state="running"}'
    before = [metric(agent, series) for series in (exports, daemons)]
    export = agent.export(images.top, labels={"for": "test"})
    assert [metric(agent, series) for series in (exports, daemons)] == [count + 1 for count in before]
    stop(agent, export)
    assert [metric(agent, series) for series in (exports, daemons)] == before
    told = [event for event in agent.events() if event["subject"] == export["id"]]
    assert [event["type"] for event in told] == ["org.hostagent.export.started.v1", "org.hostagent.export.stopped.v1"]
    assert told[0]["data"]["uri"] == export["uri"]
    assert told[0]["data"]["labels"] == {"for": "test"}


def metric(agent: AgentProcess, series: str) -> float:
    lines = agent.call("GET", "/metrics")[2].splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{series} ")), 0.0)


# Exports and jobs


KINDS = [pytest.param({}, id="continuous"), pytest.param({"increment": 4 * MIB}, id="incremental")]


def drive(agent: AgentProcess, job: Json) -> Json:
    while True:
        job = agent.until(job["id"], lambda j: j["state"] in ("waiting", "completed", "failed", "aborted"))
        if job["state"] != "waiting":
            return agent.until_ended(job["id"])
        agent.post(f"/v1/jobs/{job['id']}/next", {"cursor": job["cursor"]["cur"]})


def unleash(agent: AgentProcess, job: Json) -> None:
    """No limit any more; what clients read is copied up too, so the job may have ended already."""
    status, _, answer = agent.call("PATCH", f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    assert status == 200 or answer["code"] == "conflict", answer


@pytest.mark.parametrize("spec", KINDS)
def test_a_pull_under_an_export_drops_the_base_and_the_client_reads_on(
    agent: AgentProcess, images: Pair, spec: Json
) -> None:
    export = agent.export(images.top)
    with Reader(export["uri"], images.truth) as reader:
        assert {identity(images.top), identity(images.base)} <= open_for_data(export["pid"])
        job = drive(agent, agent.pull(images.top, **spec))
        assert (job["state"], job["revocation"]) == ("completed", REVOKED), job
        assert identity(images.base) not in open_for_data(export["pid"])
        assert identity(images.top) in open_for_data(export["pid"])
        if ROOT:
            assert not user_can_read(images.base, str(agent.user))
        assert show(agent, export)["pid"] == export["pid"]
        assert depths(export["uri"]) <= {0, 1}
        assert reader.stop() > 0
    assert content(export["uri"]) == images.truth.read_bytes()
    stop(agent, export)
    assert backing_of(images.top) is None
    assert check_clean(images.top)
    assert same_content(images.top, images.truth)
    assert_no_grants(agent, images)


@pytest.mark.parametrize(
    "spec",
    [pytest.param({}, id=f"continuous-{n}") for n in range(3)] + [pytest.param({"increment": SIZE}, id="incremental")],
)
def test_an_export_that_starts_during_a_pull_serves_right_bytes_through_its_end(
    agent: AgentProcess, images: Pair, spec: Json
) -> None:
    """Several times: a client that hangs below the stream's filter is cut off in one of three."""
    job = agent.pull(images.top, bandwidth=8 * MIB, **spec)
    agent.until(job["id"], lambda j: j["cursor"]["cur"] > 0)
    export = agent.export(images.top)
    with Reader(export["uri"], images.truth) as reader, Hasty(export["uri"]) as one, Hasty(export["uri"]) as other:
        unleash(agent, job)
        job = drive(agent, job)
        assert (job["state"], job["revocation"]) == ("completed", REVOKED), job
        assert identity(images.base) not in open_for_data(export["pid"])
        assert reader.stop() > 0
        one.stop()
        other.stop()
    stop(agent, export)
    assert check_clean(images.top)
    assert same_content(images.top, images.truth)


def test_an_export_may_end_during_a_pull_and_the_pull_goes_on(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top)
    job = agent.pull(images.top, bandwidth=8 * MIB)
    agent.until(job["id"], lambda j: j["cursor"]["cur"] > 0)
    stop(agent, export)
    unleash(agent, job)
    job = agent.until_ended(job["id"])
    assert (job["state"], job["revocation"]) == ("completed", REVOKED)
    assert eventually(lambda: not alive(export["pid"]))
    assert same_content(images.top, images.truth)


def test_an_aborted_pull_leaves_the_exports_and_their_clients_alone(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top)
    job = agent.pull(images.top, bandwidth=8 * MIB)
    agent.until(job["id"], lambda j: j["cursor"]["cur"] >= 2 * MIB)
    late = agent.export(images.top)
    with Reader(export["uri"], images.truth) as reader, Reader(late["uri"], images.truth) as other:
        agent.post(f"/v1/jobs/{job['id']}/abort")
        assert agent.until_ended(job["id"])["state"] == "aborted"
        assert identity(images.base) in open_for_data(export["pid"])
        assert reader.stop() > 0
        assert other.stop() > 0
    assert content(late["uri"]) == images.truth.read_bytes()
    stop(agent, export)
    stop(agent, late)
    assert same_content(images.top, images.truth)


def test_a_partial_pull_under_an_export_keeps_the_base_and_closes_what_lay_between(
    agent: AgentProcess, images: Pair
) -> None:
    upper = overlay(images.folder / "upper.qcow2", images.top, "qcow2")
    export = agent.export(upper)
    with Reader(export["uri"], images.truth) as reader:
        job = drive(agent, agent.pull(upper, base=str(images.base), increment=8 * MIB))
        assert (job["state"], job["revocation"]) == ("completed", REVOKED), job
        opened = open_for_data(export["pid"])
        assert identity(images.top) not in opened
        assert {identity(upper), identity(images.base)} <= opened
        if ROOT:
            assert not user_can_read(images.top, str(agent.user))
            assert user_can_read(images.base, str(agent.user))
        assert reader.stop() > 0
    stop(agent, export)
    assert backing_of(upper) == images.base.name
    assert same_content(upper, images.truth)
    assert_no_grants(agent, images)


def test_a_shallow_export_and_a_pull_of_the_same_image_exclude_each_other(agent: AgentProcess, images: Pair) -> None:
    shallow = agent.export(images.top, shallow=True)
    job = agent.until_ended(agent.pull(images.top)["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "busy"), job
    assert job["error"]["remedy"]
    stop(agent, shallow)
    job = agent.pull(images.top, bandwidth=8 * MIB)
    agent.until(job["id"], lambda j: j["cursor"]["cur"] > 0)
    error = refusal(agent, "POST", "/v1/exports", {"image": str(images.top), "shallow": True})
    assert (error.status, error.code) == (409, "busy")
    unleash(agent, job)
    assert agent.until_ended(job["id"])["state"] == "completed"
    assert same_content(images.top, images.truth)
    assert_no_grants(agent, images)


def test_an_image_that_another_program_writes_is_busy_and_names_it(agent: AgentProcess, images: Pair) -> None:
    writer = subprocess.Popen(
        ["qemu-io", str(images.top)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        assert eventually(lambda: identity(images.top) in open_for_data(writer.pid))
        time.sleep(0.1)
        error = refusal(agent, "POST", "/v1/exports", {"image": str(images.top)})
        assert (error.status, error.code) == (409, "busy")
        assert f"pid {writer.pid}" in error.body["detail"]
    finally:
        writer.kill()
        writer.wait(PATIENCE)
    stop(agent, agent.export(images.top))
    assert_no_grants(agent, images)


# Files and refusals


def test_sockets_and_folders_open_to_those_who_may_use_them_alone(agent: AgentProcess, images: Pair) -> None:
    export = agent.export(images.top)
    daemon = agent.runtime / "qsd" / export["daemon"]
    group = None
    if ROOT:
        try:
            group = grp.getgrnam("hostagent").gr_gid
        except KeyError:
            group = None
    modes = {
        agent.state: 0o700,
        agent.state / "hostagent.db": 0o600,
        agent.runtime / "qsd": 0o700,
        agent.runtime / "nbd": 0o750 if group is not None else 0o700,
        agent.socket: 0o660 if group is not None else 0o600,
        daemon: 0o700,
        Path(export["socket"]): 0o660 if group is not None else 0o600,
    }
    assert {path: oct(path.stat().st_mode & 0o777) for path in modes} == {p: oct(mode) for p, mode in modes.items()}
    assert {path.stat().st_uid for path in [*modes, daemon / "qmp.sock"]} == {os.geteuid()}
    if group is not None:
        for path in (agent.socket, agent.runtime / "nbd", Path(export["socket"])):
            assert path.stat().st_gid == group
    stop(agent, export)
    assert not daemon.exists()


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ({"image": "/nowhere.qcow2"}, "not_found"),
        ({"image": "relative.qcow2"}, "invalid"),
        ({"image": "web1/vda"}, "not_supported"),
        ({"ttl": 0}, "invalid"),
        ({"shalow": True}, "invalid"),
        ({"format": "vmdk"}, "invalid"),
    ],
)
def test_a_bad_request_is_refused_and_starts_nothing(agent: AgentProcess, images: Pair, spec: Json, code: str) -> None:
    error = refusal(agent, "POST", "/v1/exports", {"image": str(images.top), **spec})
    assert error.code == code, error.body
    assert str(images.top) not in {daemon["image"] for daemon in agent.get("/v1/host")["storage_daemons"]}
    assert not [item for item in agent.get(f"/v1/exports?target={images.top}")["items"] if item["state"] == "running"]


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="access is given to another user only as root")
def test_an_export_whose_folder_the_user_may_not_pass_is_refused_with_the_reason_or_served_by_descriptor(
    agent: AgentProcess, images: Pair
) -> None:
    """Storage daemons open by inherited descriptor: the folders above matter to nobody."""
    before = {path: permissions(path) for path in (images.top, images.base)}
    images.folder.chmod(0o700)
    export = agent.export(images.top)
    assert content(export["uri"]) == images.truth.read_bytes()
    stop(agent, export)
    assert {path: permissions(path) for path in before} == before


def test_exports_above_the_limit_and_daemons_above_theirs_are_refused(tmp_path: Path, folder: Path) -> None:
    base = raw_image(folder / "base.raw", MIB)
    tops = [overlay(folder / f"top{n}.qcow2", base) for n in range(2)]
    settings = {**HASTE, "EXPORTS_LIMIT": "2", "QSD_MAX_DAEMONS": "1"}
    with AgentProcess(tmp_path, settings) as agent:
        first = agent.export(tops[0])
        error = refusal(agent, "POST", "/v1/exports", {"image": str(tops[1])})
        assert (error.status, error.code) == (429, "limit")
        assert "qsd.max_daemons" in error.body["remedy"]
        agent.export(tops[0])
        error = refusal(agent, "POST", "/v1/exports", {"image": str(tops[0])})
        assert (error.status, error.code) == (429, "limit")
        assert "exports.limit" in error.body["remedy"]
        assert content(first["uri"]) == base.read_bytes()
        assert len([e for e in agent.get("/v1/exports")["items"] if e["state"] == "running"]) == 2
