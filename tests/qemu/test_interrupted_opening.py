"""An agent that is killed while a storage daemon opens the layers of a chain: what comes after it finds no half."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from hostagent.access.leases import FileLease
from hostagent.drivers.qsd import StorageDaemon
from hostagent.drivers.qsd_process import is_ours
from hostagent.nbd.chains import Chains
from hostagent.records import Node
from hostagent.store import Store
from jobs.model import Holder
from jobs.ports import SystemClock
from tests.harness import MIB, overlay, raw_image
from tests.qemu.test_offline_driver import Quiet, make_chains

pytestmark = pytest.mark.qemu


@contextlib.asynccontextmanager
async def stored(folder: Path) -> AsyncIterator[Store]:
    store = Store(folder, host="h", publish=lambda record: None)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def serving(chains: Chains, top: Path, holder: Holder) -> None:
    async with chains.joined(await chains.open(str(top))) as chain:
        chain.users.add(holder)
        await chain.serve()


@pytest.mark.parametrize(("done", "silent"), [(0, False), (1, False), (3, False), (4, False), (0, True)])
def test_a_daemon_that_may_not_have_opened_all_is_not_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int, silent: bool
) -> None:
    """Of the four nodes of a chain of two, `done` are there when the agent is killed. With three of them the top's file
    is open, and its node is missing; with all of them nobody has heard that they are there. A `silent` one does not
    answer, and the agent was killed before it had a record."""
    top = overlay(tmp_path / "top.qcow2", raw_image(tmp_path / "base.raw", MIB))

    async def scenario(short: Path, store: Store) -> None:
        half, whole = asyncio.Event(), StorageDaemon.open_chain

        async def killed(daemon: StorageDaemon, nodes: Sequence[Node]) -> None:
            execute, left = daemon.execute, done

            async def some(command: str, *args: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left >= 0:
                    return await execute(command, *args, **options)  # type: ignore[arg-type]
                return await asyncio.Event().wait()

            with monkeypatch.context() as patch:
                patch.setattr(daemon, "execute", some)
                opening = asyncio.create_task(whole(daemon, nodes))
                await asyncio.sleep(0.2)
            half.set()
            try:
                await asyncio.Event().wait()
            finally:
                opening.cancel()

        monkeypatch.setattr(StorageDaemon, "open_chain", killed)
        before = make_chains(short, store)
        begun = asyncio.create_task(serving(before, top, Holder("job", "one")))
        await asyncio.wait_for(half.wait(), 20)
        monkeypatch.undo()
        (record,) = await store.daemons()
        settings = before.settings
        if silent:
            os.kill(record.pid, signal.SIGSTOP)
            await store.delete_daemon(record.id)
            settings = replace(settings, qsd=replace(settings.qsd, connect_timeout=0.3, call_timeout=0.3))

        after = Chains(settings, store, FileLease, SystemClock())
        after.sink = Quiet()
        await after.recover()
        assert (after.all(), after.orphans) == ([], [])
        assert await store.daemons() == []
        assert not is_ours(record.pid, record.id)
        await serving(after, top, Holder("job", "one"))
        (chain,) = after.all()
        assert chain.daemon is not None
        assert not chain.daemon.places.opening.exists()

        again = Chains(before.settings, store, FileLease, SystemClock())
        again.sink = Quiet()
        await again.recover()
        assert [one.pid for one in again.all()] == [chain.pid]
        await again.sweep()
        assert await store.daemons() == []
        begun.cancel()
        await asyncio.gather(begun, return_exceptions=True)

    async def main() -> None:
        with tempfile.TemporaryDirectory(prefix="t3-") as short:  # socket names have 107 bytes
            async with stored(tmp_path) as store:
                await scenario(Path(short), store)

    asyncio.run(main())
