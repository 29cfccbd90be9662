"""A bounded fan-out of records to subscribers, for one asyncio loop.

A producer is never blocked and never fails because of a subscriber. Each subscription has a queue of its own with a
fixed size: when it is full the oldest record goes, the drop is counted under the subscriber's name, and the subscriber
finds RESYNC before the next record, so that it can read what it missed from the log. Only the loop's own thread may
call in; what comes from another thread goes through `loop.call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from enum import Enum
from types import TracebackType
from typing import Final, Literal

from events.model import Record


class _Marker(Enum):
    RESYNC = "resync"


RESYNC: Final = _Marker.RESYNC
"""What a subscriber gets in place of the records that its full queue has dropped."""

Item = Record | Literal[_Marker.RESYNC]


class Closed(Exception):
    """The bus or the subscription is closed, and everything that was queued has been read."""


class Subscription:
    """One subscriber's queue. Use it as a context manager; read it from one task, by `get` or `async for`."""

    def __init__(self, bus: Bus, name: str, *, size: int) -> None:
        self.name = name
        self._bus = bus
        self._queue: deque[Record] = deque(maxlen=size)
        self._lossy = False
        self._closed = False
        self._ready = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Subscription {self.name} {len(self._queue)}/{self._queue.maxlen}>"

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Item:
        try:
            return await self.get()
        except Closed:
            raise StopAsyncIteration from None

    async def get(self, timeout: float | None = None) -> Item:
        """The next record, or RESYNC where some are missing. Raises TimeoutError, and Closed at the end."""
        if not self._ready.is_set():
            async with asyncio.timeout(timeout):
                await self._ready.wait()
        if self._lossy:
            self._lossy = False
            return RESYNC
        if not self._queue:
            raise Closed
        record = self._queue.popleft()
        self._settle()
        return record

    def close(self) -> None:
        """Leave the bus. What is queued can still be read."""
        self._bus._leave(self)
        self._closed = True
        self._ready.set()

    def _put(self, record: Record) -> bool:
        """Queue a record; False when an older one had to go for it."""
        full = len(self._queue) == self._queue.maxlen
        self._queue.append(record)
        self._lossy = self._lossy or full
        self._ready.set()
        return not full

    def _settle(self) -> None:
        if not self._queue and not self._closed:
            self._ready.clear()


class Bus:
    """`publish` gives a record to every present subscription. `dropped` counts by subscriber name, for ever growing.

    Names are few and fixed ("sse", "metrics"): subscribers that come and go share one, so `dropped` stays small.
    """

    def __init__(self) -> None:
        self.dropped: dict[str, int] = {}
        self.closed = asyncio.Event()
        self._subscriptions: set[Subscription] = set()

    def subscribe(self, name: str, *, size: int) -> Subscription:
        if size < 1:
            raise ValueError(f"a subscription's size is at least 1, not {size}")
        subscription = Subscription(self, name, size=size)
        self.dropped.setdefault(name, 0)
        if self.closed.is_set():
            subscription.close()
        else:
            self._subscriptions.add(subscription)
        return subscription

    def publish(self, record: Record) -> None:
        for subscription in self._subscriptions:
            if not subscription._put(record):
                self.dropped[subscription.name] += 1

    def close(self) -> None:
        """End every subscription, after what it has queued. Later records go nowhere."""
        self.closed.set()
        for subscription in tuple(self._subscriptions):
            subscription.close()

    def _leave(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)
