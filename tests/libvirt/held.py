"""A hypervisor connection in the test's own process, and what it was told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from events.model import HypervisorEvent
from hostagent.drivers.hypervisor import Hypervisor, Settings
from hostagent.drivers.libvirt import DomainRef, Versions
from tests.libvirt.guest import Guest
from tests.libvirt.private import WAIT

SETTINGS = Settings(
    uri="",
    connect_timeout=1.0,
    call_timeout=30.0,
    keepalive_interval=1,
    keepalive_count=2,
    reconnect_wait=0.1,
    reconnect_wait_max=0.5,
    workers=4,
    event_queue=1000,
)


class Heard:
    """A sink that keeps what it is told, in order."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.threads: set[str] = set()
        self._changed = asyncio.Event()

    def libvirt_connected(self, versions: Versions) -> None:
        self._put(("connected", versions.libvirt))

    def libvirt_disconnected(self, reason: str) -> None:
        self._put(("disconnected", reason))

    def libvirt_event(self, event: HypervisorEvent) -> None:
        self._put(event)

    def libvirt_resync(self) -> None:
        self._put("resync")

    def _put(self, item: Any) -> None:
        self.items.append(item)
        self.threads.add(threading.current_thread().name)
        self._changed.set()

    async def until(self, done: Callable[[list[Any]], Any]) -> Any:
        async with asyncio.timeout(WAIT):
            while not (found := done(self.items)):
                self._changed.clear()
                await self._changed.wait()
        return found

    def count(self, what: str) -> int:
        return sum(isinstance(item, tuple) and item[0] == what for item in self.items)

    def of(self, guest: Guest) -> list[HypervisorEvent]:
        return [item for item in self.items if getattr(item, "domain", None) == guest.uuid]


class Held:
    """A hypervisor that runs, and what its sink heard."""

    def __init__(self, uri: str, **settings: Any) -> None:
        self.heard = Heard()
        self.results: list[tuple[str, str]] = []
        self.hypervisor = Hypervisor(
            replace(SETTINGS, uri=uri, **settings),
            self.heard,
            observe=lambda call, result, _: self.results.append((call, result)),
        )

    async def connected(self, times: int = 1) -> None:
        await self.heard.until(lambda _: self.heard.count("connected") >= times)

    async def block_job(self, guest: Guest, timeout: float | None = None) -> Any:
        """A call that asks QEMU, when a job runs there."""
        ref = DomainRef(guest.uuid, guest.name, True)
        return await self.hypervisor.call(
            "block_job", lambda session: session.block_job(guest.uuid, "vda"), domain=ref, timeout=timeout
        )


@contextlib.asynccontextmanager
async def held(uri: str, **settings: Any) -> AsyncIterator[Held]:
    one = Held(uri, **settings)
    task = asyncio.create_task(one.hypervisor.run())
    try:
        yield one
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        one.hypervisor.close()


def pull(guest: Guest, bandwidth: int = 0) -> None:
    import libvirt

    with guest.domain() as domain:
        domain.blockPull("vda", bandwidth, libvirt.VIR_DOMAIN_BLOCK_PULL_BANDWIDTH_BYTES)
