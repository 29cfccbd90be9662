"""Writable exports through a real agent: what clients wrote is there, and whoever else uses the image is in the way."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from tests.harness import (
    MIB,
    TEST_USER,
    AgentProcess,
    Json,
    check_clean,
    overlay,
    raw_image,
    reachable,
    same_content,
    sound,
)
from tests.qemu.faults import (
    HASTE,
    PATIENCE,
    ROOT,
    Pair,
    eventually,
    permissions,
    send,
    stopped,
    writable_for_qemu,
)
from tests.qemu.test_exports import assert_no_grants, content, granted, refusal, show, stop

nbd: Any = importlib.import_module("nbd")

pytestmark = pytest.mark.qemu

SIZE = 16 * MIB
BLOCK = 64 * 1024


class Writer:
    """A process that writes the export from its start, block by block, each filled with its number, and flushes now and
    then. It ends with status 1 at the first error."""

    CODE = textwrap.dedent(
        """
        import nbd, signal, sys, time
        going = True
        def end(*_):
            global going
            going = False
        signal.signal(signal.SIGTERM, end)
        client = nbd.NBD()
        client.connect_uri(sys.argv[1])
        count = client.get_size() // 65536
        n = 0
        while going:
            client.pwrite(n.to_bytes(4, "big") * 16384, n % count * 65536)
            n += 1
            if n == 3:
                print("in", flush=True)
            if n % 16 == 0:
                client.flush()
            time.sleep(0.002)
        client.shutdown()
        print(n)
        """
    )

    def __init__(self, uri: str) -> None:
        command = [sys.executable, "-c", self.CODE, uri]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "in\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def stop(self) -> int:
        """How many blocks it wrote; fails when a write ever failed. It does not flush at its end."""
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, err
        return int(out)

    @staticmethod
    def wrote(truth: bytes, blocks: int) -> bytes:
        """What an image with the content `truth` holds after so many blocks."""
        found = bytearray(truth)
        count = len(truth) // BLOCK
        for n in range(max(0, blocks - count), blocks):
            found[n % count * BLOCK : (n % count + 1) * BLOCK] = n.to_bytes(4, "big") * (BLOCK // 4)
        return bytes(found)


def holds(image: Path, expected: bytes, folder: Path) -> bool:
    """Whether a closed image holds exactly these bytes, and QEMU finds nothing wrong with it."""
    raw = folder / "expected.raw"
    raw.write_bytes(expected)
    return check_clean(image) and same_content(image, raw)


def serves_for_writing(agent: AgentProcess, image: Path) -> bool:
    return any(d["writable"] for d in agent.get("/v1/host")["storage_daemons"] if d["image"] == str(image))


# Bytes


def test_what_clients_wrote_is_in_the_image_and_all_is_as_before(
    agent: AgentProcess, images: Pair, folder: Path
) -> None:
    before = {path: permissions(path) for path in (images.top, images.base)}
    base = images.base.read_bytes()
    new = raw_image(folder / "new.raw", SIZE)
    export = agent.export(images.top, writable=True)
    assert (export["state"], export["writable"]) == ("running", True)
    modes = {grant["path"]: grant["mode"] for grant in agent.get("/v1/grants")["items"]}
    assert (modes[str(images.top)], modes[str(images.base)]) == ("rw", "r")
    subprocess.run(["nbdcopy", "--flush", str(new), export["uri"]], check=True, timeout=PATIENCE)
    assert content(export["uri"]) == new.read_bytes()
    stop(agent, export)
    assert holds(images.top, new.read_bytes(), folder)
    assert images.base.read_bytes() == base
    assert eventually(lambda: {path: permissions(path) for path in before} == before)
    assert_no_grants(agent, images)
    assert writable_for_qemu(images.top, "qcow2"), "nobody holds it any more"


def test_a_stop_makes_durable_what_no_client_flushed(agent: AgentProcess, images: Pair, folder: Path) -> None:
    export = agent.export(images.top, writable=True)
    with Writer(export["uri"]) as writer:
        assert eventually(lambda: show(agent, export)["clients"])
        error = refusal(agent, "DELETE", f"/v1/exports/{export['id']}")
        assert error.code == "busy", "a client is connected"
        blocks = writer.stop()
    stop(agent, export)
    assert blocks > 0
    assert holds(images.top, Writer.wrote(images.truth.read_bytes(), blocks), folder)


def test_a_raw_image_is_written_too(agent: AgentProcess, folder: Path) -> None:
    image, new = raw_image(folder / "disk.raw", SIZE), raw_image(folder / "new.raw", SIZE, MIB)
    export = agent.export(image, format="raw", writable=True)
    subprocess.run(["nbdcopy", "--flush", str(new), export["uri"]], check=True, timeout=PATIENCE)
    stop(agent, export)
    assert image.read_bytes() == new.read_bytes()


@pytest.mark.parametrize("part", [False, True], ids=["qcow2", "a part of a raw image"])
def test_every_command_of_nbd_works_and_kills_nobody(
    agent: AgentProcess, images: Pair, folder: Path, part: bool
) -> None:
    if part:
        image = raw_image(folder / "disk.raw", SIZE)
        truth = image.read_bytes()[MIB : 9 * MIB]
        export = agent.export(image, format="raw", writable=True, offset=MIB, size=8 * MIB)
    else:
        image, truth = images.top, images.truth.read_bytes()
        export = agent.export(image, writable=True)
    client = nbd.NBD()
    client.connect_uri(export["uri"])
    client.cache(2 * MIB, MIB)
    client.zero(MIB, 2 * MIB)
    client.trim(MIB, 4 * MIB)
    client.pwrite(b"f" * BLOCK, 6 * MIB, nbd.CMD_FLAG_FUA)
    client.cache(len(truth) - MIB, 0)
    client.flush()
    found = bytes(client.pread(len(truth) // 2, 0) + client.pread(len(truth) // 2, len(truth) // 2))
    client.shutdown()
    stop(agent, export)
    assert found[: 2 * MIB] == truth[: 2 * MIB]
    assert found[2 * MIB : 3 * MIB] == bytes(MIB)
    assert found[6 * MIB : 6 * MIB + BLOCK] == b"f" * BLOCK
    if part:
        assert image.read_bytes()[MIB : 9 * MIB] == found
    else:
        assert holds(image, found, folder)


def test_what_was_flushed_survives_a_killed_storage_daemon(agent: AgentProcess, images: Pair, folder: Path) -> None:
    export = agent.export(images.top, writable=True)
    client = nbd.NBD()
    client.connect_uri(export["uri"])
    expected = bytearray(images.truth.read_bytes())
    for n in range(0, SIZE, MIB):
        data = os.urandom(3 * BLOCK)
        client.pwrite(data, n + 512)
        expected[n + 512 : n + 512 + len(data)] = data
    client.flush()
    send(signal.SIGKILL, export["pid"])
    assert eventually(lambda: show(agent, export)["state"] == "lost")
    assert holds(images.top, bytes(expected), folder)
    assert eventually(lambda: not granted(agent, images))
    stop(agent, agent.export(images.top, writable=True))


def test_a_client_writes_on_while_the_agent_is_killed_and_the_next_one_keeps_the_image_for_it(
    tmp_path: Path, images: Pair, folder: Path
) -> None:
    with AgentProcess(tmp_path, HASTE) as agent:
        export = agent.export(images.top, writable=True)
        with Writer(export["uri"]) as writer:
            agent.kill()
            agent.start()
            found = show(agent, export)
            assert (found["state"], found["writable"], found["pid"]) == ("running", True, export["pid"])
            assert serves_for_writing(agent, images.top)
            for request in ({}, {"writable": True}, {"shallow": True}):
                error = refusal(agent, "POST", "/v1/exports", {"image": str(images.top), **request})
                assert (error.code, export["id"] in error.body["detail"]) == ("busy", True), error.body
            error = refusal(agent, "POST", "/v1/jobs", {"operation": "pull", "target": str(images.top)})
            assert error.code == "busy"
            assert agent.stop() == 0
            agent.start()
            assert show(agent, export)["state"] == "running"
            blocks = writer.stop()
        assert blocks > 0
        stop(agent, export)
        assert holds(images.top, Writer.wrote(images.truth.read_bytes(), blocks), folder)
        assert_no_grants(agent, images)


def test_a_daemon_that_hangs_is_not_killed_for_it_and_nothing_is_lost(
    tmp_path: Path, images: Pair, folder: Path
) -> None:
    settings = {"QMP_CALL_TIMEOUT": "0.3", "QMP_CONNECT_TIMEOUT": "0.3", "QSD_UNRESPONSIVE_KILL": "0.1"}
    settings |= {"QSD_PROBE_INTERVAL": "0.1", "QSD_STOP_TIMEOUT": "0.5", "QSD_FLUSH_TIMEOUT": "1"}
    with AgentProcess(tmp_path, {**HASTE, **settings}) as agent:
        export = agent.export(images.top, writable=True)
        with Writer(export["uri"]) as writer:
            blocks = writer.stop()
        with stopped(export["pid"]):
            for force in ("", "?force=true"):
                assert refusal(agent, "DELETE", f"/v1/exports/{export['id']}{force}").code == "unresponsive"
            assert show(agent, export)["state"] == "unresponsive"
            time.sleep(1.5)  # several probes long after qsd.unresponsive_kill
            agent.kill()
            agent.start()
            assert show(agent, export)["state"] == "unresponsive"
        assert eventually(lambda: show(agent, export)["state"] == "running")
        stop(agent, export)
        assert holds(images.top, Writer.wrote(images.truth.read_bytes(), blocks), folder)


class FailingSync:
    """A storage daemon whose fdatasync fails with EIO while a file `order` is there, by a shim below QEMU."""

    SHIM = textwrap.dedent(
        """
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <errno.h>
        #include <stdlib.h>
        #include <unistd.h>
        int fdatasync(int fd) {
            int (*next)(int) = dlsym(RTLD_NEXT, "fdatasync");
            if (access(getenv("FAILING_SYNC"), F_OK) == 0) { errno = EIO; return -1; }
            return next(fd);
        }
        """
    )

    def __init__(self, folder: Path) -> None:
        source, library, self.order = folder / "shim.c", folder / "shim.so", folder / "order"
        source.write_text(self.SHIM)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        library.chmod(0o755)
        self.binary = folder / "qemu-storage-daemon"
        self.binary.write_text(
            f'#!/bin/sh\nLD_PRELOAD={library} FAILING_SYNC={self.order} exec qemu-storage-daemon "$@"\n'
        )
        self.binary.chmod(0o755)


def test_a_stop_that_cannot_flush_says_so_and_leaves_the_export_running(
    tmp_path: Path, images: Pair, folder: Path
) -> None:
    sync = FailingSync(folder)
    with AgentProcess(tmp_path, {**HASTE, "QSD_BINARY": str(sync.binary)}) as agent:
        export = agent.export(images.top, writable=True)
        client = nbd.NBD()
        client.connect_uri(export["uri"])
        client.pwrite(b"new" * BLOCK, MIB)
        client.shutdown()
        sync.order.touch(mode=0o644)
        assert eventually(lambda: not show(agent, export)["clients"])
        error = refusal(agent, "DELETE", f"/v1/exports/{export['id']}")
        assert (error.code, "--force" in error.body["remedy"]) == ("io_error", True), error.body
        assert show(agent, export)["state"] == "running"
        sync.order.unlink()
        expected = images.truth.read_bytes()
        expected = expected[:MIB] + b"new" * BLOCK + expected[MIB + 3 * BLOCK :]
        assert content(export["uri"]) == expected, "it is served still"
        assert refusal(agent, "DELETE", f"/v1/exports/{export['id']}").code == "io_error", "no later sync makes it good"
        ended = agent.delete(f"/v1/exports/{export['id']}?force=true")
        assert (ended["state"], "not flushed" in ended["reason"]) == ("lost", True)
        assert sound(images.top)
        stop(agent, agent.export(images.top, writable=True))


# Who is in the way of a writable export


@contextmanager
def exported(agent: AgentProcess, image: Path, **spec: Any) -> Iterator[str]:
    export = agent.export(image, **spec)
    yield export["id"]
    stop(agent, export)


@contextmanager
def waiting(agent: AgentProcess, image: Path) -> Iterator[str]:
    """An incremental pull that waits, with nothing open."""
    job = agent.pull(image, increment=4 * MIB)
    agent.until(job["id"], lambda j: j["state"] == "waiting")
    yield job["id"]
    agent.post(f"/v1/jobs/{job['id']}/abort")
    agent.until_ended(job["id"])


@contextmanager
def running(*command: str) -> Iterator[str]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.read(1)
        yield f"pid {process.pid}"
    finally:
        process.kill()
        process.communicate()


READ = "import sys; f = open(sys.argv[1], 'rb'); print('in', flush=True); sys.stdin.read()"


@contextmanager
def standing_on(image: Path, folder: Path) -> Iterator[str]:
    path = overlay(folder / "sibling.qcow2", image, "qcow2")
    path.chmod(0o600)
    yield str(path)
    path.unlink()


@contextmanager
def exported_on(agent: AgentProcess, image: Path, elsewhere: Path) -> Iterator[str]:
    """An export of an overlay in another folder: the agent knows of it, though no search finds it."""
    above = overlay(elsewhere / "above.qcow2", image, "qcow2")
    with exported(agent, above) as name:
        yield name
    above.unlink()


WAYS: dict[str, Callable[[AgentProcess, Pair, Path], Any]] = {
    "an export": lambda agent, images, pool: exported(agent, images.top),
    "a shallow export": lambda agent, images, pool: exported(agent, images.top, shallow=True),
    "a writable export": lambda agent, images, pool: exported(agent, images.top, writable=True),
    "an export of an overlay": lambda agent, images, pool: exported_on(agent, images.top, images.folder),
    "a waiting job": lambda agent, images, pool: waiting(agent, images.top),
    "a process that reads": lambda agent, images, pool: running(sys.executable, "-c", READ, str(images.top)),
    "an overlay beside it": lambda agent, images, pool: standing_on(images.top, images.folder),
    "an overlay in a pool": lambda agent, images, pool: standing_on(images.top, pool),
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pool")


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, pool: Path) -> Iterator[AgentProcess]:
    """An agent with a pool of its own."""
    home = tmp_path_factory.mktemp("strict")
    with reachable(home), reachable(pool), AgentProcess(home, {**HASTE, "IMAGES_POOLS": str(pool)}) as process:
        yield process


@pytest.mark.parametrize("way", WAYS)
def test_whoever_uses_the_image_is_in_the_way_and_named(
    strict: AgentProcess, pool: Path, images: Pair, way: str
) -> None:
    with WAYS[way](strict, images, pool) as name:
        before = images.top.read_bytes()
        error = refusal(strict, "POST", "/v1/exports", {"image": str(images.top), "writable": True})
        assert (error.status, error.code, error.body["field"]) == (409, "busy", "image"), error.body
        assert name in error.body["detail"]
        assert error.body["remedy"]
        assert images.top.read_bytes() == before
    export = strict.export(images.top, writable=True)
    stop(strict, export)


def test_a_base_is_not_written_while_the_ledger_knows_of_an_overlay_that_no_search_finds(
    tmp_path: Path, folder: Path
) -> None:
    """The base lies in a pool, and the overlay anywhere: an ended pull left its need in the ledger."""
    pool, elsewhere = folder / "pool", folder / "elsewhere"
    for place in (pool, elsewhere):
        place.mkdir(mode=0o755)
    base = raw_image(pool / "base.raw", SIZE)
    above = overlay(elsewhere / "above.qcow2", base)
    request = {"image": str(base), "format": "raw", "writable": True}
    with AgentProcess(tmp_path, {**HASTE, "IMAGES_POOLS": str(pool)}) as agent:
        job = agent.pull(above, bandwidth=MIB)
        error = refusal(agent, "POST", "/v1/exports", request)
        assert (error.code, job["id"] in error.body["detail"]) == ("busy", True), error.body
        agent.until(job["id"], lambda j: j["cursor"]["cur"] > 0)
        agent.post(f"/v1/jobs/{job['id']}/abort")
        assert agent.until_ended(job["id"])["state"] == "aborted"
        error = refusal(agent, "POST", "/v1/exports", request)
        assert (error.code, str(above) in error.body["detail"]) == ("busy", True), error.body
        assert agent.until_ended(agent.pull(above)["id"])["state"] == "completed"
        stop(agent, agent.export(base, format="raw", writable=True))


# Who is refused while it stands


REQUESTS: dict[str, Callable[[Pair], tuple[str, Json]]] = {
    "an export": lambda images: ("/v1/exports", {"image": str(images.top)}),
    "a shallow export": lambda images: ("/v1/exports", {"image": str(images.top), "shallow": True}),
    "a pull": lambda images: ("/v1/jobs", {"operation": "pull", "target": str(images.top)}),
    "a dry run": lambda images: ("/v1/jobs", {"operation": "pull", "target": str(images.top), "dry_run": True}),
    "a commit": lambda images: (
        "/v1/jobs",
        {"operation": "commit", "target": str(images.top), "completion": "finish"},
    ),
    "a copy": lambda images: (
        "/v1/jobs",
        {"operation": "copy", "target": str(images.top), "dest": str(images.folder / "copy"), "completion": "finish"},
    ),
    "an export of a new overlay": lambda images: ("/v1/exports", {"image": str(_on_top(images))}),
}


def _on_top(images: Pair) -> Path:
    """An overlay that somebody makes while the image is written (qemu-img looks at no lock with -u)."""
    path = images.folder / "late.qcow2"
    command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", images.top.name, "-F", "qcow2", str(path)]
    subprocess.run([*command, str(SIZE)], check=True)
    return path


def test_while_it_stands_nobody_else_gets_the_image(agent: AgentProcess, images: Pair, folder: Path) -> None:
    export = agent.export(images.top, writable=True)
    with Writer(export["uri"]) as writer:
        for what, request in REQUESTS.items():
            path, body = request(images)
            error = refusal(agent, "POST", path, body)
            assert (error.status, error.code) == (409, "busy"), (what, error.body)
            assert export["id"] in error.body["detail"], what
            assert "stop the export first" in error.body["remedy"], what
        assert not writable_for_qemu(images.top, "qcow2")
        blocks = writer.stop()
    stop(agent, export)
    assert holds(images.top, Writer.wrote(images.truth.read_bytes(), blocks), folder)
    job = agent.until_ended(agent.pull(images.top)["id"])
    assert job["state"] == "completed"
    assert holds(images.top, Writer.wrote(images.truth.read_bytes(), blocks), folder)


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="access is given to another user only as root")
def test_the_user_may_write_the_top_alone_and_only_while_it_is_exported(agent: AgentProcess, images: Pair) -> None:
    def may_write(path: Path) -> bool:
        code = "import os, sys; os.open(sys.argv[1], os.O_RDWR)"
        command = ["setpriv", f"--reuid={TEST_USER}", "--clear-groups", "/usr/bin/python3", "-c", code, str(path)]
        return subprocess.run(command, capture_output=True).returncode == 0

    export = agent.export(images.top, writable=True)
    assert (may_write(images.top), may_write(images.base)) == (True, False)
    stop(agent, export)
    assert eventually(lambda: not may_write(images.top))
