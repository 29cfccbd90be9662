"""Blocking calls, each in a thread of its own for as long as it takes, and a limit to how many there are.

A call that a hung QEMU or a hung libvirtd holds up cannot be taken back. It keeps its worker until it returns, however
late; its caller has long been told. Each worker has a connection of its own: libvirtd serves only five calls of one
connection at a time (max_client_requests), so on a common one five such calls would stop everybody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from jobs.errors import JobError

T = TypeVar("T")
Outcome = tuple[Any, BaseException | None]
"""What came of a call: its result, or what it raised."""


class Late(JobError):
    """The call has not returned in time. It goes on."""

    def __init__(self, what: str, timeout: float) -> None:
        super().__init__(
            "unresponsive",
            f"{what}: no answer for {timeout:g} s, and it may still be carried out",
            remedy="see whether the guest's QEMU, its storage or libvirtd hangs",
        )


class Thread(threading.Thread):
    """One call at a time, in the order in which they came. Our process, at its end, does not wait for a hung one."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Outcome]] | None] = queue.SimpleQueue()
        self.start()

    def submit(self, call: Callable[[], Any]) -> asyncio.Future[Outcome]:
        """From the loop. The future is never cancelled and never raises."""
        outcome: asyncio.Future[Outcome] = self._loop.create_future()
        self._calls.put((call, outcome))
        return outcome

    def end(self) -> None:
        """After what was submitted."""
        self._calls.put(None)

    def run(self) -> None:
        while (submitted := self._calls.get()) is not None:
            call, outcome = submitted
            try:
                came: Outcome = call(), None
            except BaseException as error:  # noqa: BLE001 - the caller's to handle, whatever it is
                came = None, error
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                self._loop.call_soon_threadsafe(_tell, outcome, came)


def _tell(outcome: asyncio.Future[Outcome], came: Outcome) -> None:
    if not outcome.done():
        outcome.set_result(came)


class Connection(Protocol):
    @property
    def alive(self) -> bool: ...

    def close(self) -> None: ...


C = TypeVar("C", bound=Connection)


class Workers(Generic[C]):
    """`count` workers, made when they are needed. For one event loop. `lost` is what a broken connection raises."""

    def __init__(self, count: int, connect: Callable[[], C], lost: type[Exception]) -> None:
        self._count = count
        self._connect = connect
        self._lost = lost
        self._all: list[_Worker[C]] = []
        self._free: asyncio.LifoQueue[_Worker[C]] = asyncio.LifoQueue()
        self._under_way: dict[_Worker[C], tuple[str, float]] = {}
        self._late = 0

    async def run(
        self, call: Callable[[C], T], *, what: str, timeout: float, left: Callable[[asyncio.Future[Outcome]], None]
    ) -> T:
        """The call's result, or what it raised. Late when it takes longer than `timeout` seconds, and `unavailable`
        when all workers are taken for so long, or by calls that are late: `what` names this one to others then.

        `left` is told the outcome to come of a call that this no longer waits for: it is late, or we were cancelled.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        worker = await self._take(timeout)
        self._under_way[worker] = what, loop.time()
        outcome = worker.submit(call)
        outcome.add_done_callback(lambda _: self._done(worker))
        try:
            await asyncio.wait({outcome}, timeout=max(0.0, began + timeout - loop.time()))
        finally:
            if not outcome.done():
                self._late += 1
                outcome.add_done_callback(lambda _: self._no_longer_late())
                left(outcome)
        if not outcome.done():
            raise Late(what, timeout)
        result, error = outcome.result()
        if error is not None:
            raise error
        found: T = result
        return found

    @property
    def under_way(self) -> list[tuple[str, float]]:
        """What is called, and for how many seconds; the longest first."""
        now = asyncio.get_running_loop().time()
        return sorted(((what, now - since) for what, since in self._under_way.values()), key=lambda one: -one[1])

    def close(self) -> None:
        """Close the connections, each as soon as its worker is free."""
        for worker in self._all:
            worker.close()

    async def _take(self, timeout: float) -> _Worker[C]:
        if self._free.empty() and len(self._all) < self._count:
            worker = _Worker(f"libvirt-{len(self._all)}", self._connect, self._lost)
            self._all.append(worker)
            return worker
        if self._late >= self._count:
            raise self._all_taken()
        try:
            async with asyncio.timeout(timeout):
                return await self._free.get()
        except TimeoutError:
            raise self._all_taken() from None

    def _done(self, worker: _Worker[C]) -> None:
        del self._under_way[worker]
        self._free.put_nowait(worker)

    def _no_longer_late(self) -> None:
        self._late -= 1

    def _all_taken(self) -> JobError:
        waits = "; ".join(f"{what} (for {seconds:.0f} s)" for what, seconds in self.under_way[:8])
        return JobError(
            "unavailable",
            f"all {self._count} workers for calls to libvirt are taken: {waits}",
            remedy="see whether those guests' QEMU or libvirtd hangs; libvirt.workers allows more",
        )


class _Worker(Generic[C]):
    """A thread and its connection, which is made again when it has broken."""

    def __init__(self, name: str, connect: Callable[[], C], lost: type[Exception]) -> None:
        self._thread = Thread(name)
        self._connect = connect
        self._lost = lost
        self._connection: C | None = None

    def submit(self, call: Callable[[C], Any]) -> asyncio.Future[Outcome]:
        return self._thread.submit(lambda: self._call(call))

    def close(self) -> None:
        self._thread.submit(self._drop)
        self._thread.end()

    def _call(self, call: Callable[[C], T]) -> T:
        if self._connection is not None and not self._connection.alive:
            self._drop()
        if self._connection is None:
            self._connection = self._connect()
        try:
            return call(self._connection)
        except self._lost:
            self._drop()
            raise

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
