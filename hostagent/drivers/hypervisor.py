"""The connection to libvirt: made, kept and made again, and how everybody else uses it.

One connection hears events; calls have their own (calls.py). libvirtd may be absent at the start, go away and come
back: nothing else of the agent waits for it. After each new connection, and whenever events were lost, `resync` is
told: whoever follows events reads anew what they would have said, because libvirt repeats none.

A QEMU that hangs holds up the calls for its domain, and no others: a domain has one call at a time, and once one is
late the next are refused at once until it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

from events import normalize
from events.model import HypervisorEvent, now
from events.normalize import RawEvent
from hostagent.drivers.calls import Late, Outcome, Thread, Workers
from hostagent.drivers.domain_claims import DomainClaims
from hostagent.drivers.handover import LOST, Handover, Lost
from hostagent.drivers.libvirt import DomainRef, Keepalive, Session, Versions
from hostagent.drivers.libvirt import Lost as ConnectionLost
from hostagent.locks import Locks
from jobs.errors import JobError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Sink(Protocol):
    """Hears of the connection and of events, on the event loop and in order; must not block."""

    def libvirt_connected(self, versions: Versions) -> None: ...

    def libvirt_disconnected(self, reason: str) -> None: ...

    def libvirt_event(self, event: HypervisorEvent) -> None: ...

    def libvirt_resync(self) -> None:
        """Events were lost, or could not be heard: read anew."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Named as in the configuration, [libvirt]."""

    uri: str
    connect_timeout: float
    call_timeout: float
    keepalive_interval: int
    keepalive_count: int
    reconnect_wait: float
    reconnect_wait_max: float
    workers: int
    event_queue: int


@dataclass(frozen=True, slots=True)
class Status:
    """`reason` says why there is no connection; `since` when that began, or the connection; `deaf` why QEMU's own
    events are not heard over it."""

    connected: bool
    since: datetime
    versions: Versions | None = None
    reason: str | None = None
    deaf: str | None = None


Observe = Callable[[str, str, float], None]
"""A call's name, its result (ok, error, timeout) and its seconds."""


class Hypervisor:
    """`run` is a task for as long as the agent lives. Use it from one event loop."""

    def __init__(
        self, settings: Settings, sink: Sink, *, observe: Observe = lambda call, result, seconds: None
    ) -> None:
        self._settings = settings
        self._sink = sink
        self._observe = observe
        self._workers = Workers(settings.workers, self._session, ConnectionLost)
        self._locks = Locks()
        self._late: dict[str, str] = {}
        self._ended = False
        self._dropped = 0
        self._handover: Handover[RawEvent] | None = None
        self.claims = DomainClaims()
        self.status = Status(False, now(), reason="not connected yet")

    @property
    def dropped(self) -> int:
        """Events that came faster than they were read."""
        return self._dropped + (self._handover.dropped if self._handover else 0)

    def close(self) -> None:
        self._workers.close()

    # Calls

    async def call(
        self,
        name: str,
        call: Callable[[Session], T],
        *,
        domain: DomainRef | None = None,
        timeout: float | None = None,
    ) -> T:
        """What `call` returns, which runs in a worker. Calls for the same domain, and those for none by their name, run
        one at a time.

        `timeout` is `libvirt.call_timeout` unless given. Raises JobError: `unresponsive` (Late) when the answer is late
        or that of an earlier call is, `unavailable` without a connection (Lost when it broke meanwhile) or a worker.
        """
        began, result = time.monotonic(), "error"
        try:
            found = await self._call(name, call, domain, timeout or self._settings.call_timeout)
            result = "ok"
            return found
        except Late:
            result = "timeout"
            raise
        finally:
            self._observe(name, result, time.monotonic() - began)

    async def _call(self, name: str, call: Callable[[Session], T], domain: DomainRef | None, timeout: float) -> T:
        if not self.status.connected:
            remedy = "start libvirtd, or see `hostagent doctor`"
            raise JobError("unavailable", f"libvirt is not connected: {self.status.reason}", remedy=remedy)
        key, what = (domain.uuid, f"{name} of domain {domain.name!r}") if domain else (name, name)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout

        def left(outcome: asyncio.Future[Outcome]) -> None:
            self._late[key] = what
            outcome.add_done_callback(lambda _: self._late.pop(key))

        async with self._turn(key, what, deadline):
            return await self._workers.run(call, what=what, timeout=max(0.0, deadline - loop.time()), left=left)

    @contextlib.asynccontextmanager
    async def _turn(self, key: str, what: str, deadline: float) -> AsyncIterator[None]:
        """The key's turn, or a refusal while an earlier call of the key is late."""
        self._refuse_late(key, what)
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout_at(deadline):
                    await stack.enter_async_context(self._locks.alone(key))
            except TimeoutError:
                text = f"{what}: earlier calls took all the time"
                raise JobError("busy", text, remedy="try again when they are done") from None
            self._refuse_late(key, what)
            yield

    def _refuse_late(self, key: str, what: str) -> None:
        if (late := self._late.get(key)) is not None:
            remedy = "see whether the guest's QEMU, its storage or libvirtd hangs"
            raise JobError("unresponsive", f"{what}: an earlier call ({late}) has no answer yet", remedy=remedy)

    def _session(self) -> Session:
        settings = self._settings
        return Session(settings.uri, Keepalive(settings.keepalive_interval, settings.keepalive_count))

    # The connection for events

    async def run(self) -> None:
        """Connect, and connect again, until cancelled."""
        thread = Thread("libvirt-link")
        try:
            while True:
                await self._connected_once(thread)
        finally:
            self._ended = True
            thread.end()

    async def _connected_once(self, thread: Thread) -> None:
        """From an attempt to connect until that connection has ended. An attempt cannot be taken back: one that takes
        long is waited for, and said."""
        loop = asyncio.get_running_loop()
        closed: asyncio.Future[str] = loop.create_future()
        handover: Handover[RawEvent] = Handover(self._told, size=self._settings.event_queue)

        def on_close(reason: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(lambda: None if closed.done() else closed.set_result(reason))

        session, versions = await self._attempts(thread, lambda: self._link(handover.put, on_close))
        try:
            self._handover = handover
            self._up(versions, session.deaf)
            handover.start()
            reason = await closed
            self._down(f"the connection ended: {reason}")
        finally:
            handover.stop()
            self._dropped, self._handover = self.dropped, None
            thread.submit(session.close)

    async def _attempts(self, thread: Thread, link: Callable[[], tuple[Session, Versions]]) -> tuple[Session, Versions]:
        wait = self._settings.reconnect_wait
        while True:
            attempt = thread.submit(link)
            await asyncio.wait({attempt}, timeout=self._settings.connect_timeout)
            if not attempt.done():
                self._down(f"{self._settings.uri} has not answered for {self._settings.connect_timeout:g} s")
                await asyncio.wait({attempt})
            found, error = attempt.result()
            if error is None:
                session, versions = found
                return session, versions
            self._down(error.message if isinstance(error, JobError) else repr(error))
            await asyncio.sleep(wait)
            wait = min(2 * wait, self._settings.reconnect_wait_max)

    def _link(self, on_event: Callable[[RawEvent], None], on_close: Callable[[str], None]) -> tuple[Session, Versions]:
        """In the thread."""
        session = self._session()
        try:
            session.watch(on_event, on_close)
            versions = session.versions()
            if self._ended:
                raise ConnectionLost("nobody waits for this connection any longer")
            return session, versions
        except BaseException:
            session.close()
            raise

    def _up(self, versions: Versions, deaf: str | None) -> None:
        self.status = Status(True, now(), versions, deaf=deaf)
        log.info("libvirt connected", extra={"fields": {"uri": self._settings.uri, "version": versions.libvirt}})
        self._sink.libvirt_connected(versions)
        self._sink.libvirt_resync()

    def _down(self, reason: str) -> None:
        before = self.status
        self.status = Status(False, now() if before.connected else before.since, before.versions, reason)
        if before.connected:
            log.warning("libvirt disconnected", extra={"fields": {"uri": self._settings.uri, "reason": reason}})
            self._sink.libvirt_disconnected(reason)
        elif before.reason != reason:
            log.info("libvirt is not connected", extra={"fields": {"uri": self._settings.uri, "reason": reason}})

    def _told(self, raw: RawEvent | Lost) -> None:
        if raw is LOST:
            self._sink.libvirt_resync()
        elif (event := normalize.of_libvirt(raw)) is not None:
            self._sink.libvirt_event(event)
