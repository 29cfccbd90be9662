"""Network images as exports: their bytes, who else may have them, and servers that are gone or silent."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, raw_image, reachable, stand_still
from tests.qemu.faults import HASTE, PATIENCE, ROOT, Pair, eventually, listens
from tests.qemu.remote_storage import nbd_server, needs_nbdkit
from tests.qemu.test_apart_exports import bytes_of
from tests.qemu.test_exports import Client, alive, content, refusal, show, stop

nbd: Any = importlib.import_module("nbd")

pytestmark = [pytest.mark.qemu, needs_nbdkit]

SIZE = 4 * MIB
HOSTAGENT = (sys.executable, "-m", "hostagent.cli.main")
SETTINGS = {
    **HASTE,
    "IMAGES_NETWORK": f"127.0.0.1,{tempfile.gettempdir()}",
    "IMAGES_WATCH_INTERVAL": "0.1",
    "EXPORTS_OPEN_TIMEOUT": "2",
}
IMPATIENT = {**SETTINGS, "QMP_CALL_TIMEOUT": "4", "QSD_STOP_TIMEOUT": "4", "QSD_FLUSH_TIMEOUT": "4"}
"""So that a test of a server which is silent for ever does not last for ever."""


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    home = tmp_path_factory.mktemp("agent")
    with reachable(home), AgentProcess(home, SETTINGS) as process:
        yield process


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[str, Path, subprocess.Popen[bytes]]]:
    """A server on a unix socket with a file of random bytes: URI, file, process."""
    with nbd_server(folder, SIZE, *options) as (uri, disk, server):
        raw_image(disk, SIZE)
        yield uri, disk, server


@contextlib.contextmanager
def served_by_tcp(folder: Path) -> Iterator[tuple[str, Path]]:
    """qemu-nbd on a port of the loopback address; its export is `disk`."""
    disk = raw_image(folder / "tcp.raw", SIZE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["qemu-nbd", "--persistent", "--shared=8", "-b", "127.0.0.1", "-p", str(port), "-x", "disk"]
    server = subprocess.Popen([*command, "-f", "raw", str(disk)])
    try:
        assert eventually(lambda: up(port))
        yield f"nbd://127.0.0.1:{port}/disk", disk
    finally:
        server.terminate()
        server.wait(PATIENCE)


def up(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def grants(agent: AgentProcess, export: Json) -> list[Json]:
    items: list[Json] = agent.get(f"/v1/grants?holder=export:{export['id']}")["items"]
    return items


def start(agent: AgentProcess, uri: str, **spec: Any) -> Json:
    export: Json = agent.post("/v1/exports", {"image": uri, **spec})
    assert export["state"] == "running", export
    return export


def asked(agent: AgentProcess, uri: str, **spec: Any) -> Any:
    return refusal(agent, "POST", "/v1/exports", {"image": uri, **spec})


def start_when_free(agent: AgentProcess, uri: str) -> Json:
    """A writable export, once the job that is told to have ended has let go of its lease: a moment later."""

    def attempt() -> Json | None:
        try:
            return start(agent, uri, writable=True)
        except ApiError as error:
            assert error.code == "busy", error
            time.sleep(0.05)
            return None

    export = eventually(attempt)
    assert export
    return dict(export)


def connected(uri: str) -> Any:
    client = nbd.NBD()
    client.connect_uri(uri)
    return client


def hanging_read(client: Any) -> None:
    """Send a read that is not waited for."""
    client.aio_pread(nbd.Buffer(4096), 0)
    assert eventually(lambda: client.aio_in_flight() == 1 and not client.poll(0))


def ended(agent: AgentProcess, export: Json) -> bool:
    return eventually(lambda: not alive(export["pid"]) and not grants(agent, export))


# Bytes


def test_clients_read_what_the_server_has(agent: AgentProcess, folder: Path) -> None:
    with served(folder) as (unix, disk, _), served_by_tcp(folder) as (tcp, other):
        for uri, file in ((unix, disk), (tcp, other)):
            export = start(agent, uri)
            assert (export["image"], export["size"], export["format"]) == (uri, SIZE, "raw")
            copy = folder / "copy.raw"
            subprocess.run(["nbdcopy", export["uri"], str(copy)], check=True, timeout=PATIENCE)
            assert copy.read_bytes() == file.read_bytes()
            client = connected(export["uri"])
            assert client.is_read_only()
            client.shutdown()
            stop(agent, export)
            assert ended(agent, export)


def test_what_clients_write_is_at_the_server_when_the_export_is_stopped(agent: AgentProcess, folder: Path) -> None:
    with served(folder) as (uri, disk, _):
        before, new = disk.read_bytes(), os.urandom(MIB)
        export = start(agent, uri, writable=True)
        client = connected(export["uri"])
        client.pwrite(new, MIB)
        client.shutdown()
        stop(agent, export)
        assert disk.read_bytes() == before[:MIB] + new + before[2 * MIB :]
        assert ended(agent, export)


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("offset", [None, MIB])
def test_a_client_that_sends_cache_kills_nobody(
    agent: AgentProcess, folder: Path, writable: bool, offset: int | None
) -> None:
    with served(folder) as (uri, disk, _):
        export = start(agent, uri, writable=writable, offset=offset or 0)
        client = connected(export["uri"])
        client.set_strict_mode(0)
        with contextlib.suppress(nbd.Error):
            client.cache(MIB, 0)
        assert bytes(client.pread(MIB, MIB)) == disk.read_bytes()[(offset or 0) + MIB :][:MIB]
        client.shutdown()
        stop(agent, export)


@pytest.mark.parametrize(
    ("offset", "size"), [(512, 1024), (MIB, None), (None, 512), (SIZE - 512, 512), (0, SIZE)], ids=str
)
def test_a_part_is_all_that_clients_see(
    agent: AgentProcess, folder: Path, offset: int | None, size: int | None
) -> None:
    spec = {name: value for name, value in (("offset", offset), ("size", size)) if value is not None}
    begin, end = offset or 0, SIZE if size is None else (offset or 0) + size
    with served(folder) as (uri, disk, _):
        export = start(agent, uri, writable=True, **spec)
        assert (export["offset"], export["size"]) == (begin, end - begin)
        assert bytes_of(export["uri"]) == disk.read_bytes()[begin:end]
        before = disk.read_bytes()
        client = connected(export["uri"])
        client.pwrite(b"x" * 512, 0)
        client.shutdown()
        stop(agent, export)
        assert disk.read_bytes() == before[:begin] + b"x" * 512 + before[begin + 512 :]


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"offset": SIZE + 512}, "offset"),
        ({"offset": 512, "size": SIZE}, "size"),
        ({"offset": 100}, "offset"),
        ({"size": 100}, "size"),
        ({"size": 0}, "size"),
    ],
    ids=str,
)
def test_a_part_that_is_none_is_refused(agent: AgentProcess, folder: Path, spec: Json, field: str) -> None:
    with served(folder) as (uri, _, _):
        error = asked(agent, uri, **spec)
        assert (error.code, error.body["field"]) == ("invalid", field), error.body
    assert agent.get("/v1/grants")["items"] == []


def test_the_same_id_asks_for_the_same_export(agent: AgentProcess, folder: Path) -> None:
    with served(folder) as (uri, _, _):
        request = {"id": str(uuid.uuid4()), "image": uri, "offset": 512, "max_clients": 1}
        export = agent.post("/v1/exports", request)
        assert agent.call("POST", "/v1/exports", request)[0] == 200
        assert refusal(agent, "POST", "/v1/exports", {**request, "offset": 1024}).code == "conflict"
        with Client(export["uri"]):
            assert len(show(agent, export)["clients"]) == 1
            assert refusal(agent, "DELETE", f"/v1/exports/{export['id']}").code == "busy"
        stop(agent, export)


# Access


def test_a_grant_says_that_nothing_was_given_and_nothing_is_ever_said_to_be_revoked(
    agent: AgentProcess, folder: Path
) -> None:
    with served(folder) as (uri, _, _):
        export = start(agent, uri)
        (grant,) = grants(agent, export)
        assert (grant["access"], grant["mode"], grant["state"]) == ("none", "r", "granted")
        assert (grant["path"], grant["holder"]) == (export["path"], {"kind": "export", "id": export["id"]})
        assert "revoked" in grant["detail"]
        doctor = command(agent, "doctor", "--json", check=False)["checks"]
        assert any(check["name"] == "network images" and "1 image" in check["message"] for check in doctor)
        stop(agent, export)
        assert agent.get("/v1/grants")["items"] == []
    told = [event for event in agent.events() if event["data"].get("path", "").startswith("nbd")]
    assert {event["type"].split(".")[2] for event in told} == {"export"}
    assert agent.get("/v1/host")["changed_files"] == []


@pytest.mark.skipif(not ROOT, reason="as a plain user the hypervisor user is the server's own")
def test_a_socket_that_the_hypervisor_user_may_not_use_is_named(agent: AgentProcess, folder: Path) -> None:
    with served(folder) as (uri, _, _):
        where = Path(uri.partition("socket=")[2])
        where.chmod(0o600)
        error = asked(agent, uri)
        assert (error.code, error.body["field"]) == ("access_refused", "image"), error.body
        assert f"u:{agent.user}:rw {where}" in error.body["remedy"]
        link = folder / "link.sock"
        link.symlink_to(where)
        error = asked(agent, uri.replace(str(where), str(link)))
        assert f"u:{agent.user}:rw {where}," in error.body["remedy"].replace(")", ","), error.body


def command(agent: AgentProcess, *words: str, check: bool = True) -> Any:
    done = subprocess.run(
        [*HOSTAGENT, "--socket", str(agent.socket), *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=check,
    )
    return json.loads(done.stdout) if "--json" in words else done.stdout


def test_the_command_line_says_it_too(agent: AgentProcess, folder: Path) -> None:
    with served(folder) as (uri, disk, _):
        export = command(agent, "export", "start", uri, "--json")
        assert bytes_of(export["uri"]) == disk.read_bytes()
        shown = command(agent, "export", "show", export["id"])
        assert export["path"] in shown
        assert export["path"] in command(agent, "grant", "list", "--path", export["path"])
        assert eventually(lambda: not show(agent, export)["clients"])
        command(agent, "export", "stop", export["id"])


# Refusals


def test_no_server_is_reached_that_the_configuration_does_not_list(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, AgentProcess(tmp_path, HASTE) as agent:
        server.settimeout(0.2)
        error = asked(agent, f"nbd://127.0.0.1:{server.getsockname()[1]}/x")
        assert (error.code, error.body["field"]) == ("denied", "image")
        assert "images.network" in error.body["detail"]
        assert "images.network" in error.body["remedy"]
        with pytest.raises(TimeoutError):
            server.accept()
        assert agent.daemons() == []


@pytest.mark.parametrize(
    ("spec", "code", "field"),
    [
        ({"format": "qcow2"}, "not_supported", "format"),
        ({"shallow": True}, "not_supported", "shallow"),
        ({"bitmaps": ["b"]}, "not_supported", "bitmaps"),
        ({"tcp": "auto", "tls": "psk"}, "not_supported", "tcp"),
        ({"image": "nbd://root:geheim@127.0.0.1/x"}, "invalid", "image"),
        ({"image": "nbds://root:geheim@127.0.0.1/x"}, "not_supported", "image"),
        ({"image": "https://root:geheim@127.0.0.1/x"}, "not_supported", "image"),
        ({"image": "nbd:///x"}, "invalid", "image"),
        ({"image": "nbd+unix:///x?socket=/tmp/../run/s"}, "invalid", "image"),
        ({"image": "nbd://localhost/x"}, "denied", "image"),
        ({"image": "nbd+unix:///?socket=/run/nbd/s"}, "denied", "image"),
    ],
    ids=str,
)
def test_what_a_network_image_cannot_be_is_refused(
    agent: AgentProcess, folder: Path, spec: Json, code: str, field: str
) -> None:
    with served(folder) as (uri, _, _):
        error = refusal(agent, "POST", "/v1/exports", {"image": uri, **spec})
    assert (error.code, error.body["field"]) == (code, field), error.body
    assert error.body["remedy"]
    assert "geheim" not in json.dumps(error.body)
    assert "geheim" not in agent.log.read_text()
    assert agent.daemons() == []
    assert agent.get("/v1/grants")["items"] == []


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/jobs", {"operation": "pull", "target": "nbd://127.0.0.1/x"}),
        ("POST", "/v1/jobs", {"operation": "commit", "target": "nbd://127.0.0.1/x", "dry_run": True}),
        ("POST", "/v1/jobs", {"operation": "copy", "target": "nbd://127.0.0.1/x", "dest": "/tmp/x.raw"}),
        ("GET", "/v1/images/inspect?path=nbd://127.0.0.1/x", None),
    ],
)
def test_other_uses_of_a_network_image_are_refused(agent: AgentProcess, method: str, path: str, body: Any) -> None:
    error = refusal(agent, method, path, body)
    assert (error.code, error.body["field"]) == ("not_supported", "target" if body else "path"), error.body
    assert "exported" in error.body["remedy"]


def test_a_server_that_refuses_is_told_by_what_it_refused(agent: AgentProcess, folder: Path) -> None:
    with served_by_tcp(folder) as (uri, _):
        assert asked(agent, uri.replace("disk", "other")).code == "not_found"
    with served(folder, "--filter=readahead", "-r") as (uri, disk, _):
        error = asked(agent, uri, writable=True)
        assert (error.code, error.body["field"]) == ("denied", "writable"), error.body
        export = start(agent, uri)
        assert bytes_of(export["uri"]) == disk.read_bytes()
        stop(agent, export)
    error = asked(agent, uri)
    assert (error.code, error.body["field"]) == ("unavailable", "image"), error.body
    assert eventually(lambda: agent.daemons() == [])


# Alone


def test_a_writable_export_has_its_uri_for_itself_however_it_is_written(agent: AgentProcess, folder: Path) -> None:
    with served(folder) as (uri, disk, _):
        other = uri.replace("socket=/", "socket=//")
        export = start(agent, uri, writable=True)
        for spec in ({"writable": True}, {}):
            error = asked(agent, other, **spec)
            assert (error.code, error.body["holders"]) == ("busy", [f"export:{export['id']}"]), error.body
        assert bytes_of(export["uri"]) == disk.read_bytes(), "refusals take nothing from it"
        stop(agent, export)
        readers = [start(agent, uri), start(agent, other)]
        assert asked(agent, uri, writable=True).code == "busy"
        for reader in readers:
            assert bytes_of(reader["uri"]) == disk.read_bytes()
            stop(agent, reader)
        stop(agent, start(agent, uri, writable=True))


def test_a_copy_and_an_export_keep_out_of_each_others_way(agent: AgentProcess, folder: Path) -> None:
    source = raw_image(folder / "source.raw", SIZE)
    wanted = {"operation": "copy", "target": str(source), "source_format": "raw", "completion": "finish"}
    with served(folder) as (uri, disk, _):
        export = start(agent, uri, writable=True)
        error = refusal(agent, "POST", "/v1/jobs", {**wanted, "dest": uri})
        assert (error.code, error.body["holders"]) == ("busy", [f"export:{export['id']}"]), error.body
        stop(agent, export)

        job = agent.post("/v1/jobs", {**wanted, "dest": uri, "bandwidth": 65536})
        agent.until(job["id"], lambda job: job["state"] == "running")
        for spec in ({"writable": True}, {}):
            error = asked(agent, uri, **spec)
            assert (error.code, error.body["holders"]) == ("busy", [f"job:{job['id']}"]), error.body
        error = refusal(agent, "POST", "/v1/jobs", {**wanted, "dest": uri})
        assert error.code == "busy"
        agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
        assert agent.until_ended(job["id"])["state"] == "completed"
        assert disk.read_bytes() == source.read_bytes()
        stop(agent, start_when_free(agent, uri))


def test_a_copy_that_failed_or_was_aborted_gives_the_uri_back(agent: AgentProcess, folder: Path) -> None:
    source = raw_image(folder / "source.raw", SIZE)
    wanted = {"operation": "copy", "target": str(source), "source_format": "raw", "completion": "finish"}
    with served(folder) as (uri, _, _):
        job = agent.post("/v1/jobs", {**wanted, "dest": uri, "bandwidth": 65536})
        agent.until(job["id"], lambda job: job["state"] == "running")
        agent.post(f"/v1/jobs/{job['id']}/abort")
        assert agent.until_ended(job["id"])["state"] == "aborted"
        stop(agent, start_when_free(agent, uri))


# Servers that go away


def test_clients_of_a_server_that_died_get_errors_and_nobody_else_does(
    agent: AgentProcess, folder: Path, images: Pair
) -> None:
    other = agent.export(images.top)
    with served(folder) as (uri, disk, server):
        export = start(agent, uri)
        client = connected(export["uri"])
        server.kill()
        server.wait(PATIENCE)
        with pytest.raises(nbd.Error):
            client.pread(512, 0)
        assert content(other["uri"]) == images.truth.read_bytes()
        assert show(agent, export)["state"] == "running"
        back = nbdkit_again(uri, disk)
        try:
            assert eventually(lambda: reads(client) == disk.read_bytes()[:512])
        finally:
            back.kill()  # SIGTERM would wait for its clients
            back.wait(PATIENCE)
        client.shutdown()
        stop(agent, export)
        assert ended(agent, export)
    stop(agent, other)


def nbdkit_again(uri: str, disk: Path) -> subprocess.Popen[bytes]:
    """The server that was killed, at the same socket."""
    where = Path(uri.partition("socket=")[2])
    where.unlink()
    server = subprocess.Popen(["nbdkit", "-f", "-U", str(where), "file", str(disk)])
    assert eventually(lambda: listens(where))
    where.chmod(0o666)
    return server


def reads(client: Any) -> bytes | None:
    try:
        return bytes(client.pread(512, 0))
    except nbd.Error:
        time.sleep(0.1)
        return None


def test_what_was_not_flushed_to_a_server_that_died_is_never_said_to_be_stopped_well(
    agent: AgentProcess, folder: Path
) -> None:
    with served(folder) as (uri, disk, server):
        export = start(agent, uri, writable=True)
        client = connected(export["uri"])
        client.pwrite(b"x" * 512, 0)
        client.shutdown()
        assert eventually(lambda: not show(agent, export)["clients"])
        server.kill()
        server.wait(PATIENCE)
        assert refusal(agent, "DELETE", f"/v1/exports/{export['id']}").code == "io_error"
        found = show(agent, export)
        assert (found["state"], "perhaps lost" in found["reason"]) == ("running", True), found
        back = nbdkit_again(uri, disk)
        try:
            client = connected(export["uri"])
            assert eventually(lambda: reads(client) is not None)
            client.flush()
            client.shutdown()
            assert eventually(lambda: not show(agent, export)["clients"])
            assert refusal(agent, "DELETE", f"/v1/exports/{export['id']}").code == "io_error", (
                "nobody knows what is lost"
            )
            agent.kill()
            agent.start()
            assert refusal(agent, "DELETE", f"/v1/exports/{export['id']}").code == "io_error"
        finally:
            back.kill()  # SIGTERM would wait for its clients
            back.wait(PATIENCE)
        gone = agent.delete(f"/v1/exports/{export['id']}?force=true")
        assert gone["state"] == "lost", gone
        assert ended(agent, export)


def test_a_stop_does_not_rely_on_a_server_that_came_back_unseen(agent: AgentProcess, folder: Path) -> None:
    """QEMU would flush over the new connection, and say that all is well."""
    with served(folder) as (uri, disk, server):
        export = start(agent, uri, writable=True)
        client = connected(export["uri"])
        client.pwrite(b"x" * 512, 0)
        server.kill()
        server.wait(PATIENCE)
        back = nbdkit_again(uri, disk)
        try:
            assert eventually(lambda: reads(client) is not None)
            client.shutdown()
            assert eventually(lambda: not show(agent, export)["clients"])
            error = refusal(agent, "DELETE", f"/v1/exports/{export['id']}")
            assert (error.code, "went away" in error.body["detail"]) == ("io_error", True), error.body
            assert "--force" in error.body["remedy"]
            gone = agent.delete(f"/v1/exports/{export['id']}?force=true")
            assert (gone["state"], "lost" in gone["reason"]) == ("lost", True), gone
        finally:
            back.kill()
            back.wait(PATIENCE)
        assert ended(agent, export)


# Servers that are silent


def test_a_server_that_is_silent_from_the_beginning_holds_up_nobody(
    agent: AgentProcess, folder: Path, images: Pair
) -> None:
    with served(folder) as (uri, _, server):
        stand_still(server.pid)
        asking = [
            subprocess.Popen(
                [*HOSTAGENT, "--socket", str(agent.socket), "export", "start", uri, "--json"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for _ in range(3)
        ]  # fmt: skip
        assert eventually(lambda: len(agent.daemons()) == 3)
        export = agent.export(images.top)
        assert content(export["uri"]) == images.truth.read_bytes()
        stop(agent, export)
        assert agent.until_ended(agent.pull(images.top)["id"])["state"] == "completed"
        for process in asking:
            _, error = process.communicate(timeout=PATIENCE)
            assert process.returncode == 1
            assert "cannot be opened" in error
        assert eventually(lambda: agent.daemons() == [])
        assert agent.get("/v1/grants")["items"] == []
        server.send_signal(signal.SIGCONT)
        stop(agent, start(agent, uri, writable=True))


def test_an_agent_that_is_killed_while_it_waits_for_a_silent_server_leaves_nothing(
    tmp_path: Path, folder: Path
) -> None:
    with (
        AgentProcess(tmp_path, {**SETTINGS, "EXPORTS_OPEN_TIMEOUT": "8"}) as agent,
        served(folder) as (uri, _, server),
    ):
        stand_still(server.pid)
        asking = subprocess.Popen(
            [*HOSTAGENT, "--socket", str(agent.socket), "export", "start", uri],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert eventually(agent.daemons)
            assert eventually(lambda: len(agent.get("/v1/grants")["items"]) == 1)
            agent.kill()
        finally:
            asking.kill()
            asking.wait(PATIENCE)
        agent.start(timeout=2 * PATIENCE)
        assert eventually(lambda: agent.daemons() == [])
        assert agent.get("/v1/grants")["items"] == []
        assert {export["state"] for export in agent.get("/v1/exports")["items"]} <= {"lost"}
        server.send_signal(signal.SIGCONT)
        stop(agent, start(agent, uri, writable=True))


@pytest.mark.parametrize("writable", [False, True])
def test_a_server_that_falls_silent_holds_up_nobody_and_force_ends_it(
    tmp_path: Path, folder: Path, images: Pair, writable: bool
) -> None:
    with AgentProcess(tmp_path, IMPATIENT) as agent, served(folder) as (uri, disk, server):
        other = agent.export(images.top)
        export = start(agent, uri, writable=writable)
        client = connected(export["uri"])
        assert bytes(client.pread(512, 0)) == disk.read_bytes()[:512]
        stand_still(server.pid)
        hanging_read(client)
        assert content(other["uri"]) == images.truth.read_bytes()
        assert agent.until_ended(agent.pull(images.top)["id"])["state"] == "completed"
        assert show(agent, export)["state"] == "running"
        error = refusal(agent, "DELETE", f"/v1/exports/{export['id']}")
        assert error.code == ("unresponsive" if writable else "busy"), error.body
        gone = agent.delete(f"/v1/exports/{export['id']}?force=true")
        assert (gone["state"], writable) in (("stopped", False), ("lost", True)), gone
        assert ended(agent, export)
        assert content(other["uri"]) == images.truth.read_bytes()
        stop(agent, other)


# Restart


@pytest.mark.parametrize("writable", [False, True])
def test_it_outlives_the_agent(tmp_path: Path, folder: Path, writable: bool) -> None:
    with AgentProcess(tmp_path, SETTINGS) as agent, served(folder) as (uri, disk, _):
        export = start(agent, uri, writable=writable, offset=MIB)
        client = connected(export["uri"])
        if writable:
            client.pwrite(b"before" * 512, 0)
        agent.kill()
        if writable:
            client.pwrite(b"while" * 512, MIB)
        agent.settings = {**HASTE}  # what was let in stays
        agent.start()
        found = show(agent, export)
        assert (found["state"], found["image"], found["offset"]) == ("running", uri, MIB)
        assert len(grants(agent, export)) == 1
        assert bytes_of(export["uri"]) == disk.read_bytes()[MIB:]
        client.shutdown()
        agent.stop()
        agent.settings = SETTINGS
        agent.start()
        assert asked(agent, uri, writable=True).code == "busy"
        if writable:
            assert asked(agent, uri).code == "busy"
        stop(agent, export)
        assert ended(agent, export)
        if writable:
            now = disk.read_bytes()
            assert now[MIB:].startswith(b"before" * 512)
            assert now[2 * MIB :].startswith(b"while" * 512)
        stop(agent, start(agent, uri, writable=True))


def test_a_copy_has_its_uri_for_itself_after_a_restart(tmp_path: Path, folder: Path) -> None:
    source = raw_image(folder / "source.raw", SIZE)
    wanted = {"operation": "copy", "target": str(source), "source_format": "raw", "completion": "finish"}
    with AgentProcess(tmp_path, SETTINGS) as agent, served(folder) as (uri, disk, _):
        job = agent.post("/v1/jobs", {**wanted, "dest": uri, "bandwidth": 65536})
        agent.until(job["id"], lambda job: job["state"] == "running")
        agent.kill()
        agent.start()
        error = asked(agent, uri, writable=True)
        assert (error.code, error.body["holders"]) == ("busy", [f"job:{job['id']}"]), error.body
        agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
        assert agent.until_ended(job["id"])["state"] == "completed"
        assert disk.read_bytes() == source.read_bytes()


def test_one_whose_storage_daemon_died_is_lost(agent: AgentProcess, folder: Path) -> None:
    with served(folder) as (uri, _, _):
        export = start(agent, uri, writable=True)
        os.kill(export["pid"], signal.SIGKILL)
        assert eventually(lambda: show(agent, export)["state"] == "lost")
        assert ended(agent, export)
        stop(agent, start(agent, uri, writable=True))
