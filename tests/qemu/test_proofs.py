"""What the design stands on, tried on the storage daemon itself, with no agent in between (but for the API's socket).

When one of these fails with a newer QEMU, an assumption of the agent is wrong, whatever its other tests say.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from hostagent.drivers.process import User
from hostagent.drivers.qmp import Monitor
from hostagent.drivers.qsd import BlockJob, StorageDaemon
from hostagent.drivers.qsd_process import Places, Settings
from hostagent.images.chain import ChainLimits, open_chain
from hostagent.records import Node
from jobs.errors import JobError
from jobs.model import FileId
from jobs.ports import Phase
from tests.harness import MIB, AgentProcess, backing_of, check_clean, ensure_user, same_content
from tests.qemu.faults import PATIENCE, Pair, Reader, eventually
from tests.qemu.test_exports import Hasty

nbd: Any = importlib.import_module("nbd")

pytestmark = pytest.mark.qemu

ROOT = os.geteuid() == 0
SIZE = 16 * MIB
NOBODY = 65534
JOB = "pull-1"


@dataclass
class Bench:
    """A storage daemon with the chain of an overlay open in it, layer by layer, read-only."""

    daemon: StorageDaemon
    nodes: list[Node]
    settings: Settings
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    @property
    def top(self) -> Node:
        return self.nodes[0]

    @property
    def below(self) -> Node | None:
        return self.nodes[1] if len(self.nodes) > 1 else None

    def open_modes(self) -> dict[FileId, bool]:
        """Which of the layers' files the daemon has open for data, and whether for writing."""
        return self.daemon.open_modes([node.layer.file for node in self.nodes])

    @property
    def uri(self) -> str:
        return f"nbd+unix:///disk?socket={self.daemon.places.socket}"

    async def reopen(self, *, writable: bool) -> None:
        await self.daemon.reopen((self.top, self.below), writable=writable)

    async def stream(self) -> None:
        await self.daemon.stream(JOB, self.top, None, backing=None, speed=0)

    async def until(self, phase: Phase) -> BlockJob:
        async with asyncio.timeout(PATIENCE):
            while (found := await self.daemon.block_job(JOB)).phase is not phase:
                await asyncio.sleep(0.005)
            return found

    async def reconnected(self) -> StorageDaemon:
        """What the next agent has of the daemon: its process id, its places, and a new connection."""
        await self.daemon.detach()
        await asyncio.sleep(0.3)
        other = _daemon(self.daemon.places, self.settings)
        await other.adopt(self.daemon.pid)
        self.daemon = other
        return other


def _settings(user: User) -> Settings:
    return Settings(
        binary="qemu-storage-daemon",
        user=user,
        connect_timeout=PATIENCE,
        call_timeout=PATIENCE,
        start_timeout=PATIENCE,
        stop_timeout=PATIENCE,
        flush_timeout=PATIENCE,
        open_files=1024,
        max_connections=8,
    )


def _daemon(places: Places, settings: Settings, on_event: Callable[..., None] = lambda *_: None) -> StorageDaemon:
    return StorageDaemon(places.folder.name, places, settings, on_event=on_event, on_exit=lambda: None)


@contextlib.asynccontextmanager
async def bench(image: Path | None, *, user: User | None = None, opened: bool = True) -> AsyncIterator[Bench]:
    settings = _settings(user or User.current())
    home = Path(tempfile.mkdtemp(prefix="ha-"))  # socket names are short, pytest's folders are not
    home.chmod(0o755)
    places = Places(home / "proof", home / "proof" / "qmp.sock", home / "nbd.sock")
    places.folder.mkdir(mode=0o700)
    events: list[tuple[str, Mapping[str, Any]]] = []
    daemon = _daemon(places, settings, lambda name, data: events.append((name, data)))
    it = Bench(daemon, [], settings, events)
    try:
        await it.daemon.launch(_grasp(it, image) if image else [])
        if opened:
            await daemon.open_chain(it.nodes)
        yield it
    finally:
        for node in it.nodes:
            os.close(node.descriptor)
        if it.daemon.pid and it.daemon.alive:
            await it.daemon.kill()
        shutil.rmtree(home)


def _grasp(it: Bench, image: Path) -> list[int]:
    with open_chain(str(image), limits=ChainLimits(), format="qcow2") as chain:
        for n, (layer, fd) in enumerate(zip(chain.chain.layers, chain.fds, strict=True)):
            it.nodes.append(Node(layer, n, os.open(f"/proc/self/fd/{fd}", os.O_PATH)))
    return [node.descriptor for node in it.nodes]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 2 * PATIENCE))


async def aside(work: Callable[..., Any], *args: Any) -> Any:
    """In a thread: the event loop watches the daemon meanwhile."""
    return await asyncio.to_thread(work, *args)


def local_bytes(image: Path) -> int:
    """How much of the image's content is in the top layer, by the metadata on disk."""
    command = ["qemu-img", "map", "-U", "--output=json", str(image)]
    extents = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return sum(extent["length"] for extent in extents if extent["depth"] == 0 and extent["present"])


def data_bytes(image: Path) -> int:
    """How much of the image's content is data in any layer."""
    command = ["qemu-img", "map", "-U", "--output=json", str(image)]
    extents = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return sum(extent["length"] for extent in extents if extent["present"])


@pytest.fixture
def images(folder: Path) -> Pair:
    return Pair(folder / "pair", SIZE)


# The graph


def test_a_client_reads_right_bytes_while_the_chain_is_reopened_for_writing_and_back(images: Pair) -> None:
    async def test() -> None:
        async with bench(images.top) as it:
            await it.daemon.add_client_export("disk", it.top)
            with Reader(it.uri, images.truth) as reader:
                for _ in range(10):
                    await it.reopen(writable=True)
                    assert it.open_modes()[it.top.layer.file] is True
                    await asyncio.sleep(0.01)
                    await it.reopen(writable=False)
                    assert it.open_modes()[it.top.layer.file] is False
                assert await aside(reader.stop) > 0
            assert await it.daemon.quit()

    run(test())
    assert check_clean(images.top)
    assert same_content(images.top, images.truth)


def test_a_daemon_has_nothing_open_but_what_it_was_given_also_for_the_agent_that_comes_back(images: Pair) -> None:
    def opened(pid: int) -> set[int]:
        """The files of its chain's folder that it has open for data or pinned."""
        links = [Path(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        return {link.stat().st_ino for link in links if link.readlink().parent == images.top.parent}

    async def test() -> None:
        async with bench(images.top) as it:
            late = Path(shutil.copy(images.top, images.top.with_name("late.qcow2")))
            target = replace(it.top.layer, path=str(late), file=FileId(late.stat().st_dev, late.stat().st_ino))
            await it.daemon.grasp(str(late), target, 9)
            layers = {target.file.ino, *(node.layer.file.ino for node in it.nodes)}
            await it.reopen(writable=True)
            await it.stream()
            assert opened(it.daemon.pid) == layers <= it.daemon.inodes
            other = await it.reconnected()
            assert opened(other.pid) == layers <= other.inodes
            assert await other.quit()

    run(test())


def test_a_pull_under_a_connected_client_ends_with_the_base_closed(images: Pair) -> None:
    """Reopen, stream, finalize, reopen without the backing link, remove the base: the client reads on."""

    async def test() -> None:
        async with bench(images.top) as it:
            base = it.nodes[1]
            await it.daemon.add_client_export("disk", it.top)
            with Reader(it.uri, images.truth) as reader:
                await it.reopen(writable=True)
                await it.stream()
                await it.until(Phase.PENDING)
                await it.daemon.flush(it.top, it.below)
                await it.daemon.finalize(JOB)
                await it.until(Phase.CONCLUDED)
                await it.daemon.dismiss(JOB)
                await it.daemon.remove_stream_top()
                assert base.layer.file in it.open_modes()
                await it.daemon.reopen((it.top, None), writable=False)
                await it.daemon.remove(base)
                assert base.layer.file not in it.open_modes()
                assert await aside(reader.stop) > 0
            assert await it.daemon.quit()

    run(test())
    assert backing_of(images.top) is None
    assert check_clean(images.top)
    assert same_content(images.top, images.truth)


def test_qemu_does_not_survive_that_a_job_takes_away_the_layer_of_an_exported_bitmap(folder: Path) -> None:
    """Why an export with bitmaps has a storage daemon that no job works in."""
    images = Pair(folder / "pair", SIZE, middle=True)
    assert images.middle is not None
    subprocess.run(["qemu-img", "bitmap", "--add", str(images.middle), "log"], check=True)

    async def test() -> None:
        async with bench(images.top) as it:
            await it.daemon.add_client_export("disk", it.top, bitmaps=["log"])
            await it.reopen(writable=True)
            await it.stream()
            await it.until(Phase.PENDING)
            await it.daemon.flush(it.top, it.below)
            await it.daemon.finalize(JOB)
            await it.until(Phase.CONCLUDED)
            await it.daemon.dismiss(JOB)
            await it.daemon.remove_stream_top()
            await it.daemon.reopen((it.top, None), writable=False)
            with pytest.raises(JobError) as caught:
                await it.daemon.remove(it.nodes[1])
            assert caught.value.code == "storage_daemon_died"
            assert "dirty_bitmap" in caught.value.message

    run(test())
    assert check_clean(images.top)
    assert same_content(images.top, images.truth)


@pytest.mark.parametrize("again", range(3))
def test_a_client_that_comes_while_a_stream_runs_is_kept_through_its_end(images: Pair, again: int) -> None:
    """The stream has a filter of its own to work on, and the export stays on the top itself."""

    async def test() -> None:
        async with bench(images.top) as it:
            await it.reopen(writable=True)
            await it.daemon.stream(JOB, it.top, None, backing=None, speed=8 * MIB)
            await it.daemon.add_client_export("disk", it.top)
            with Reader(it.uri, images.truth) as reader, Hasty(it.uri) as one, Hasty(it.uri) as other:
                with contextlib.suppress(JobError):  # it has copied all of it already
                    await it.daemon.set_speed(JOB, 0)
                await it.until(Phase.PENDING)
                await it.daemon.flush(it.top, it.below)
                await it.daemon.finalize(JOB)
                await it.until(Phase.CONCLUDED)
                await it.daemon.dismiss(JOB)
                await it.daemon.remove_stream_top()
                await it.daemon.reopen((it.top, None), writable=False)
                await it.daemon.remove(it.nodes[1])
                assert await aside(reader.stop) > 0
                one.stop()
                other.stop()
            assert await it.daemon.exports() == {"disk"}

    run(test())
    assert same_content(images.top, images.truth)


def test_a_client_that_asks_a_read_only_chain_to_copy_up_is_refused_and_kills_nobody(images: Pair) -> None:
    """A read-only format over a writable file would abort the process (QEMU 7.2): so both are read-only."""

    async def test() -> None:
        async with bench(images.top) as it:
            await it.daemon.add_client_export("disk", it.top)
            await aside(_cache_refused, it.uri)
            assert await it.daemon.exports() == {"disk"}

    run(test())


def _cache_refused(uri: str) -> None:
    client = nbd.NBD()
    client.connect_uri(uri)
    with pytest.raises(nbd.Error):
        client.cache(SIZE, 0)
        client.flush()
    assert len(client.pread(512, 0)) == 512
    client.shutdown()


def test_the_files_are_those_that_were_grasped_whatever_happens_to_their_paths(images: Pair) -> None:
    async def test() -> None:
        async with bench(images.top, opened=False) as it:
            for path in (images.base, images.top):
                path.rename(path.with_suffix(".moved"))
                path.write_bytes(b"another file")
            await it.daemon.open_chain(it.nodes)
            await it.daemon.add_client_export("disk", it.top)
            await it.reopen(writable=True)
            content = await aside(_read_all, it.uri)
            assert content == images.truth.read_bytes()
            assert images.top.read_bytes() == b"another file"

    run(test())


def _read_all(uri: str) -> bytes:
    client = nbd.NBD()
    client.connect_uri(uri)
    content = b"".join(client.pread(MIB, n * MIB) for n in range(client.get_size() // MIB))
    client.shutdown()
    return content


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="runs the storage daemon as another user")
def test_an_inherited_descriptor_gives_no_access_by_itself(images: Pair) -> None:
    async def test() -> None:
        async with bench(images.top, user=User.named(str(ensure_user())), opened=False) as it:
            with pytest.raises(JobError, match="Permission denied"):
                await it.daemon.open_chain(it.nodes)
            for path in (images.top, images.base):
                subprocess.run(["setfacl", "-m", f"u:{ensure_user()}:r", str(path)], check=True)
            await it.daemon.remove(it.nodes[1])
            await it.daemon.open_chain(it.nodes)
            with pytest.raises(JobError, match="Permission denied"):
                await it.reopen(writable=True)

    run(test())


# Listeners


def test_a_client_that_connects_before_the_process_exists_is_served() -> None:
    """The listener is bound by us and handed over: the kernel queues who comes early, nobody polls for a file."""

    async def test() -> None:
        async with bench(None) as it:
            places = it.daemon.places
            assert places.socket.stat().st_mode & 0o777 == 0o600
            assert places.socket.stat().st_uid == os.geteuid()

    run(test())
    with tempfile.TemporaryDirectory(prefix="ha-") as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/nbd.sock")
        listener.listen(4)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(f"{folder}/nbd.sock")
            command = ["qemu-storage-daemon", "--nbd-server", f"addr.type=fd,addr.str={listener.fileno()}"]
            process = subprocess.Popen(command, pass_fds=(listener.fileno(),))
            try:
                assert client.recv(8) == b"NBDMAGIC"
            finally:
                process.terminate()
                process.wait(PATIENCE)


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="runs the storage daemon as another user")
def test_the_sockets_belong_to_the_agent_whoever_serves_them(images: Pair) -> None:
    async def test() -> None:
        async with bench(None, user=User.named(str(ensure_user()))) as it:
            for path in (it.daemon.places.socket, it.daemon.places.monitor):
                assert path.stat().st_uid == 0
            assert it.daemon.places.socket.stat().st_mode & 0o777 == 0o600
            assert Path(f"/proc/{it.daemon.pid}").stat().st_uid == User.named(str(ensure_user())).uid

    run(test())


def test_a_monitor_that_another_client_has_does_not_hang_us(images: Pair) -> None:
    """QEMU greets one client of a listening monitor; the next one waits, and learns why after its time."""

    async def test() -> None:
        async with bench(images.top) as it:
            path = str(it.daemon.places.monitor)
            one, other = _monitor("one", PATIENCE), _monitor("other", 0.3)
            await one.connect(path)
            with pytest.raises(JobError, match=r"no answer within 0\.3 s") as caught:
                await other.connect(path)
            assert caught.value.code == "unresponsive"
            await one.close()
            again = _monitor("again", PATIENCE)
            await again.connect(path)
            assert await again.execute("query-block-exports") == []
            await again.close()

    run(test())


def _monitor(name: str, patience: float) -> Monitor:
    return Monitor(
        name, connect_timeout=patience, call_timeout=PATIENCE, on_event=lambda *_: None, on_close=lambda: None
    )


def test_the_command_that_crashes_qemu_is_never_sent() -> None:
    async def test() -> None:
        async with bench(None) as it:
            with pytest.raises(ValueError, match="query-named-block-nodes"):
                await it.daemon.execute("query-named-block-nodes")
            assert await it.daemon.execute("query-version")

    run(test())


CLIENT = """
import http.client, socket, sys
connection = http.client.HTTPConnection("localhost")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(sys.argv[1])
connection.request("GET", "/v1/host", headers={"X-Forwarded-User": "root", "Authorization": "Basic cm9vdDo="})
print(connection.getresponse().status)
"""


def test_the_api_answers_its_own_user(agent: AgentProcess) -> None:
    assert _asks(agent, None) == "200"
    assert agent.socket.stat().st_uid == os.geteuid()
    assert agent.socket.stat().st_mode & 0o007 == 0


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="becomes another user")
def test_the_api_refuses_another_user_by_the_kernels_word_whatever_the_sockets_mode(agent: AgentProcess) -> None:
    assert "PermissionError" in _asks(agent, NOBODY)
    agent.socket.chmod(0o666)
    assert _asks(agent, NOBODY) == "403"
    assert eventually(lambda: f'"uid": {NOBODY}' in agent.log.read_text())


def _asks(agent: AgentProcess, uid: int | None) -> str:
    other: dict[str, Any] = {} if uid is None else {"user": uid, "group": uid, "extra_groups": []}
    command = [sys.executable, "-c", CLIENT, str(agent.socket)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=PATIENCE, **other)
    return str(done.stdout.strip() or done.stderr.strip().splitlines()[-1])


# A job's result


def test_a_failed_job_and_its_error_are_found_by_the_next_connection(images: Pair) -> None:
    async def test() -> None:
        async with bench(images.top, opened=False) as it:
            await _open_with_bad_base(it)
            await it.reopen(writable=True)
            await it.stream()
            daemon = await it.reconnected()
            found = await daemon.block_job(JOB)
            assert found.phase is Phase.CONCLUDED
            assert found.error == "Input/output error"
            await daemon.dismiss(JOB)
            assert (await daemon.block_job(JOB)).phase is Phase.ABSENT

    run(test())
    assert backing_of(images.top) is not None
    assert check_clean(images.top)
    assert same_content(images.top, images.truth)


async def _open_with_bad_base(it: Bench) -> None:
    """The same graph, but reading the base's last MiB of data fails."""
    top, base = it.nodes
    execute = it.daemon.execute
    file: dict[str, Any] = {"driver": "file", "read_only": True}
    await execute("blockdev-add", node_name="f1", filename=f"/proc/self/fd/{base.descriptor}", **file)
    bad = {"event": "read_aio", "errno": 5, "sector": (SIZE - SIZE // 8) // 512 - 8, "once": False}
    await execute("blockdev-add", driver="blkdebug", node_name="bad", image="f1", read_only=True, inject_error=[bad])
    await execute("blockdev-add", driver="raw", node_name="l1", file="bad", read_only=True)
    await execute("blockdev-add", node_name="f0", filename=f"/proc/self/fd/{top.descriptor}", **file)
    await execute("blockdev-add", driver="qcow2", node_name="l0", file="f0", backing="l1", read_only=True)


def test_a_job_that_ended_well_while_nobody_was_connected_is_found_by_the_next_connection(images: Pair) -> None:
    async def test() -> None:
        async with bench(images.top) as it:
            await it.reopen(writable=True)
            await it.stream()
            daemon = await it.reconnected()
            assert (await daemon.block_job(JOB)).phase is Phase.PENDING
            await daemon.flush(it.top, it.below)
            await daemon.finalize(JOB)
            daemon = await it.reconnected()
            found = await daemon.block_job(JOB)
            assert (found.phase, found.error) == (Phase.CONCLUDED, None)

    run(test())
    assert backing_of(images.top) is None
    assert same_content(images.top, images.truth)


def test_the_end_of_a_job_is_told_by_events(images: Pair) -> None:
    async def test() -> None:
        async with bench(images.top) as it:
            await it.reopen(writable=True)
            await it.stream()
            await it.until(Phase.PENDING)
            await it.daemon.finalize(JOB)
            await it.until(Phase.CONCLUDED)
            told = [data.get("status", name) for name, data in it.events if JOB in (data.get("id"), data.get("device"))]
            assert told[-4:] == ["pending", "BLOCK_JOB_PENDING", "BLOCK_JOB_COMPLETED", "concluded"]

    run(test())


# Durability. SIGKILL takes what the process had in memory; what it had written stays.


def test_what_was_copied_up_and_not_flushed_may_be_lost_and_the_image_is_whole(images: Pair) -> None:
    async def test() -> None:
        async with bench(images.top) as it:
            await it.reopen(writable=True)
            await it.daemon.add_client_export("disk", it.top)
            client = await aside(_copy_up, it.uri)
            await _sigkill(it)
            del client  # kept until here: a connection that closes is no flush, but why give it the chance

    before = local_bytes(images.top)
    run(test())
    assert before <= local_bytes(images.top) < data_bytes(images.top), "the metadata of a copy-up is written by a flush"
    assert check_clean(images.top)
    assert same_content(images.top, images.truth)


def test_what_was_copied_up_and_flushed_is_local_after_a_kill(images: Pair) -> None:
    async def test() -> None:
        async with bench(images.top) as it:
            await it.reopen(writable=True)
            await it.daemon.add_client_export("disk", it.top)
            client = await aside(_copy_up, it.uri)
            await aside(client.flush)
            await _sigkill(it)

    run(test())
    assert local_bytes(images.top) == data_bytes(images.top)
    assert check_clean(images.top)
    assert same_content(images.top, images.truth)


def _copy_up(uri: str) -> Any:
    client = nbd.NBD()
    client.connect_uri(uri)
    for offset in range(0, SIZE, MIB):
        client.cache(MIB, offset)
    return client


@pytest.mark.parametrize("pause", [0.0, 0.001, 0.003, 0.01])
def test_a_header_without_its_base_means_that_nothing_is_missing_although_killed_at_once(
    images: Pair, pause: float
) -> None:
    """At `pending` a reopen flushes all data, and only then finalize lets the header be rewritten."""

    async def test() -> None:
        async with bench(images.top) as it:
            await it.reopen(writable=True)
            await it.stream()
            await it.until(Phase.PENDING)
            assert backing_of(images.top) is not None
            await it.daemon.flush(it.top, it.below)
            await it.daemon.finalize(JOB)
            await asyncio.sleep(pause)
            await _sigkill(it)

    run(test())
    assert check_clean(images.top)
    assert same_content(images.top, images.truth)
    if backing_of(images.top) is None:
        images.base.unlink()
        assert same_content(images.top, images.truth)


def test_a_pull_killed_while_it_is_pending_leaves_the_image_on_its_base(images: Pair) -> None:
    async def test() -> None:
        async with bench(images.top) as it:
            await it.reopen(writable=True)
            await it.stream()
            await it.until(Phase.PENDING)
            await _sigkill(it)

    run(test())
    assert backing_of(images.top) is not None
    assert check_clean(images.top)
    assert same_content(images.top, images.truth)


def test_a_reopen_of_the_writable_nodes_makes_all_pulled_data_local(images: Pair) -> None:
    async def test() -> None:
        async with bench(images.top) as it:
            await it.reopen(writable=True)
            await it.stream()
            await it.until(Phase.PENDING)
            await it.daemon.flush(it.top, it.below)
            await _sigkill(it)

    run(test())
    assert local_bytes(images.top) == data_bytes(images.top)
    assert check_clean(images.top)


def test_a_job_cancelled_and_its_daemon_ended_by_sigterm_lose_nothing_that_was_pulled(images: Pair) -> None:
    async def test() -> None:
        async with bench(images.top) as it:
            await it.reopen(writable=True)
            await it.stream()
            await it.until(Phase.PENDING)
            await it.daemon.cancel(JOB)
            assert (await it.until(Phase.CONCLUDED)).error == "Operation canceled"
            assert await it.daemon.quit()

    run(test())
    assert backing_of(images.top) is not None
    assert local_bytes(images.top) == data_bytes(images.top)
    assert check_clean(images.top)
    assert same_content(images.top, images.truth)


async def _sigkill(it: Bench) -> None:
    os.kill(it.daemon.pid, signal.SIGKILL)
    await it.daemon.kill()


def test_a_partial_copy_up_stops_at_the_given_layer(folder: Path) -> None:
    """copy-on-read with `bottom`, read through: what lies below the bottom stays there."""
    images = Pair(folder / "pair", SIZE)
    upper = images.folder / "upper.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", str(upper)]
    subprocess.run(command, check=True)

    async def test() -> None:
        async with bench(upper) as it:
            await it.reopen(writable=True)
            await it.daemon.add_copy_on_read(it.nodes[0], it.nodes[1])
            await it.daemon.add_export("disk", "cor")
            await aside(_read_all, it.uri)
            assert await it.daemon.remove_export("disk", hard=True)
            await it.daemon.remove_copy_on_read()
            assert await it.daemon.quit()

    own = local_bytes(images.top)
    run(test())
    assert local_bytes(upper) == own < data_bytes(upper)
    assert same_content(upper, images.truth)
