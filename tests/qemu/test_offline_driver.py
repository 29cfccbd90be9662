"""The driver of offline images keeps the promises of a driver, on a real qemu-storage-daemon."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hostagent.access.leases import FileLease
from hostagent.access.ledger import Ledger, Settings
from hostagent.access.subject import OwnProbe, Subject
from hostagent.drivers import qsd_process
from hostagent.drivers.process import User
from hostagent.images.chain import ChainLimits
from hostagent.images.measure import Measure
from hostagent.images.qemu_img import QemuImg, ToolLimits
from hostagent.nbd import chains as nbd_chains
from hostagent.nbd import network
from hostagent.nbd.chains import Chains
from hostagent.nbd.committing import Commit
from hostagent.nbd.copying import Copy
from hostagent.nbd.headers import Headers
from hostagent.nbd.offline import OfflineDriver
from hostagent.nbd.operations import Search
from hostagent.nbd.prepared import Lease, PreparedChain
from hostagent.nbd.pulling import Pull, SliceLimits
from hostagent.nbd.space import Space
from hostagent.store import Store
from jobs.errors import JobError
from jobs.model import Completion, FileId, Holder, Operation, Revocation, State
from jobs.ports import SystemClock
from tests.contract.driver_suite import MIB, SIZE, Rig, on_a_rig
from tests.contract.group_suite import GroupSuite, hardened
from tests.contract.ready_suite import EXISTING, NEW, Work, completed, gone, on_rigs, ready
from tests.harness import backing_of, overlay, raw_image, same_content, sound
from tests.qemu.faults import eventually, open_below

pytestmark = pytest.mark.qemu


class Quiet:
    """Hears of what happens to storage daemons, and tells nobody."""

    def qmp_event(self, chain: PreparedChain, name: str, data: Mapping[str, Any]) -> None: ...

    def daemon_gone(self, chain: PreparedChain) -> None: ...

    def responsive(self, chain: PreparedChain, answers: bool) -> None: ...

    async def moved(self, chain: PreparedChain) -> None: ...


def writes(path: str) -> bool:
    """Whether QEMU's tools may write the image: they write back what is there."""
    command = ["qemu-io", "-f", "qcow2", "-c", "write -P 77 1M 64k", path]
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


def make_chains(folder: Path, store: Store) -> Chains:
    for name in ("qsd", "nbd"):
        (folder / name).mkdir(mode=0o700)
    settings = nbd_chains.Settings(
        qsd=qsd_process.Settings(
            binary="qemu-storage-daemon",
            user=User.current(),
            connect_timeout=5.0,
            call_timeout=10.0,
            start_timeout=10.0,
            stop_timeout=5.0,
            flush_timeout=5.0,
            open_files=1024,
            max_connections=10,
        ),
        limits=ChainLimits((), 10),
        daemons=folder / "qsd",
        sockets=folder / "nbd",
        max_daemons=4,
        probe_interval=1.0,
        unresponsive_kill=0.0,
        socket_gid=None,
        inspect_timeout=10.0,
        network=network.Settings((), 5),
    )
    chains = Chains(settings, store, FileLease, SystemClock())
    chains.sink = Quiet()
    return chains


def make_driver(chains: Chains, store: Store) -> OfflineDriver:
    """As a plain user's agent has it: files are opened by right, not by grant."""
    ledger = Ledger(
        store,
        Subject("us", os.geteuid(), (), own=True),
        OwnProbe(),
        settings=Settings(5.0, manage_shared=False),
        clock=SystemClock(),
        daemons=lambda: {},
        observe=lambda trigger, result: None,
    )
    headers = Headers(10.0)
    space = Space(Measure(user=None, limits=ToolLimits(), binary="qemu-img"), ledger)
    return OfflineDriver(
        chains,
        ledger,
        QemuImg(user=None, limits=ToolLimits()),
        pull=Pull(SliceLimits(slice=2 * MIB, requests_in_flight=4, request_size=MIB, nbd_timeout=10.0), headers),
        copy=Copy(chains, Search(lambda files, folders, skip: [], 30.0), space, 10.0),
        commit=Commit(Search(lambda files, folders, skip: [], 30.0), space, headers, 10.0),
        check_auto=1 << 30,
    )


class TestOfflineDriver(GroupSuite):
    @on_a_rig
    async def test_a_daemon_that_dies_while_the_target_is_leased_leaves_no_lease(self, rig: Rig) -> None:
        assert isinstance(rig.driver, OfflineDriver)
        chains, holder = rig.driver._chains, Holder("export", "e")
        async with chains.joined(await chains.open(rig.top)) as chain:
            await chain.lease()
            await chain.serve()
            chain.users.add(holder)
        leasing = chains.leasing

        def killing(fd: int, *, exclusive: bool, ours: Sequence[int]) -> Lease:
            (pid,) = ours
            os.kill(pid, signal.SIGKILL)
            assert eventually(lambda: chain.died)
            return leasing(fd, exclusive=exclusive, ours=ours)

        chains.leasing = killing
        job = await rig.job(Operation.COPY, dest=rig.dest)
        with pytest.raises(JobError) as refused:
            await rig.prepared(job)
        assert refused.value.code == "storage_daemon_died"
        chains.leasing = leasing
        await rig.driver.discard(job)

    @on_rigs(NEW, EXISTING)
    async def test_nobody_writes_the_whole_target_of_a_daemon_that_died(self, rig: Rig, work: Work) -> None:
        assert isinstance(rig.driver, OfflineDriver)
        job = await hardened(rig, work)
        await gone(rig, job)
        assert job.target is not None and job.target.file is not None
        path = job.target.part or job.target.path
        assert await asyncio.to_thread(eventually, lambda: not writes(path))
        rig.driver._chains.kept.release(job.target.file)  # as with the agent's process
        assert writes(path)
        await rig.driver.claim(job)
        assert not writes(path)
        await rig.driver.name(job)
        assert not writes(job.target.path)
        job = replace(job, completion=Completion.PIVOT)
        assert (await rig.driver.observe(job)).proven
        await rig.end(job, State.COMPLETED)
        assert writes(job.target.path)

    @on_rigs(NEW, EXISTING)
    async def test_a_sealed_copy_that_is_finished_can_be_written_before_its_job_is_said_to_be_completed(
        self, rig: Rig, work: Work
    ) -> None:
        job = await completed(rig, await ready(rig, work), Completion.FINISH)
        for _ in range(2):
            await rig.driver.seal(job)
        assert writes(rig.dest)
        assert (await rig.driver.observe(job)).done or work is NEW  # it can still be told after a restart
        await rig.end(job, State.COMPLETED)
        assert rig.same(rig.dest)

    @on_a_rig
    async def test_what_somebody_uses_by_now_is_not_deleted(self, rig: Rig) -> None:
        job = await rig.job(Operation.COMMIT, top=rig.middle, delete=True)
        job = replace(job, state=State.COMPLETED, revocation=Revocation.PENDING)  # and the agent was away meanwhile
        assert [layer.path for layer in job.dropped] == [rig.middle]
        command = ["qemu-io", "-c", "sleep 60000", rig.middle]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
            try:
                assert await asyncio.to_thread(eventually, lambda: open_below(other.pid, Path(rig.middle).parent))
                deletion = await rig.driver.delete_dropped(job, ())
            finally:
                other.kill()
        (warning,) = deletion.warnings
        assert not deletion.files
        assert warning.startswith(f"{rig.middle} was not deleted: ")
        assert str(other.pid) in warning
        assert rig.middle in rig.names()

    @contextlib.asynccontextmanager
    async def rig(self, folder: Path) -> AsyncIterator[Rig]:
        base = raw_image(folder / "base.raw", SIZE)
        middle = overlay(folder / "mid.qcow2", base)
        top = overlay(folder / "top.qcow2", middle, "qcow2")
        qemu_io(middle, *(f"write -q -P {n} {n}M 1M" for n in range(1, 15)))
        qemu_io(top, "write -q -P 77 1M 1M", "write -q -P 78 15M 512k")
        truth = folder.parent / "truth"
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(top), str(truth)], check=True)
        state = folder.parent / "state"
        state.mkdir()
        store = Store(state, host="h", publish=lambda record: None)
        await store.open()
        with tempfile.TemporaryDirectory(prefix="t3-") as short:  # socket names have 107 bytes
            chains = make_chains(Path(short), store)

            def serves() -> FileId:
                (chain,) = chains.all()
                return chain.file

            try:
                yield Rig(
                    make_driver(chains, store),
                    *(str(path) for path in (top, middle, base, folder / "dest.qcow2")),
                    backing=lambda: backing_of(top),
                    kill=lambda: kill(chains),
                    make=empty_image,
                    names=lambda: {str(path) for path in folder.iterdir()},
                    same=lambda path: same_content(Path(path), truth, first="raw" if path == str(base) else None),
                    serves=serves,
                )
                assert chains.all() == []
                assert await store.daemons() == []
                assert list(Path(short).glob("*/*")) == []
                # Of a chain whose daemon died they are closed aside, in a thread.
                assert await asyncio.to_thread(eventually, lambda: open_below(os.getpid(), folder) == [])
                if top.exists():
                    assert sound(top)
                    assert same_content(top, truth)
            finally:
                for chain in chains.all():  # what a failed test left
                    if chain.daemon is not None:
                        await chain.daemon.kill()
                await store.close()


def qemu_io(image: Path, *commands: str) -> None:
    subprocess.run(["qemu-io", *(word for line in commands for word in ("-c", line)), str(image)], check=True)


def empty_image(path: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)


async def kill(chains: Chains) -> None:
    (chain,) = chains.all()
    assert chain.pid is not None
    os.kill(chain.pid, signal.SIGKILL)
