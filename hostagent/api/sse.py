"""The event stream: text/event-stream from the log, then live, without a gap and without a duplicate.

The subscription comes first, then the replay of the log; a live record that the replay has sent already is skipped by
its sequence number. Wherever numbers are missing (our queue was full, two writers published out of order) the log is
read again from the last one sent. Only when the log no longer has them does the client get `resync`: it must then read
the objects anew. Progress is transient; it has no number and is never replayed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from events.bus import RESYNC, Bus, Closed, Item, Subscription
from events.cloudevents import to_json, type_of
from events.model import Record
from hostagent.api import problem
from hostagent.api.gate import PEER_KEY
from hostagent.api.peer import NOBODY, Peer, Places

PAGE = 500  # records that one replay step holds in memory


class Log(Protocol):
    """The part of the service that remembers."""

    async def events_since(self, seq: int, limit: int) -> list[Record] | None:
        """Up to `limit` records after `seq`; None when the log no longer reaches back that far."""

    def last_seq(self) -> int:
        """The number of the newest record, 0 when there was none."""


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """Named as in the configuration: [agent] host; [api] sse_heartbeat, sse_queue, sse_subscribers."""

    host: str
    heartbeat: float
    queue: int
    subscribers: int


class Streams:
    """The open streams of this process: how many there may be, and what each of them sends."""

    def __init__(self, log: Log, bus: Bus, settings: StreamSettings) -> None:
        self._log = log
        self._bus = bus
        self._settings = settings
        self.places = Places(settings.subscribers)

    def response(self, since: int | None) -> Response:
        return EventStream(self, since)

    async def chunks(self, since: int | None) -> AsyncGenerator[bytes, None]:
        """What one client gets. Ends when the bus closes."""
        with self._bus.subscribe("sse", size=self._settings.queue) as live:
            yield b"retry: 1000\n\n"
            sent = self._log.last_seq() if since is None else since
            async for seq, chunk in self._replay(sent):
                sent = seq
                yield chunk
            async for record in self._live(live):
                if record is None:
                    yield b": heartbeat\n\n"
                    continue
                if record is RESYNC or record.seq > sent + 1:
                    async for seq, chunk in self._replay(sent):
                        sent = seq
                        yield chunk
                if record is not RESYNC and (record.seq == 0 or record.seq > sent):
                    sent = record.seq or sent
                    yield self._event(record)

    async def _replay(self, sent: int) -> AsyncIterator[tuple[int, bytes]]:
        """The log after `sent`, each chunk with the number up to which the client then knows everything."""
        while True:
            records = await self._log.events_since(sent, PAGE)
            last = self._log.last_seq()
            if records is None or sent > last:  # forgotten, or a number from another life of the store
                sent = last
                yield sent, _frame(type="resync", data={"from": sent}, seq=sent)
                return
            for record in records:
                sent = record.seq
                yield sent, self._event(record)
            if len(records) < PAGE:
                return

    async def _live(self, live: Subscription) -> AsyncIterator[Item | None]:
        while True:
            try:
                yield await live.get(self._settings.heartbeat)
            except TimeoutError:
                yield None
            except Closed:
                return

    def _event(self, record: Record) -> bytes:
        return _frame(type=type_of(record.event), data=to_json(record, self._settings.host), seq=record.seq)


class EventStream(Response):
    """One open stream. It holds its place among the subscribers exactly as long as it runs."""

    def __init__(self, streams: Streams, since: int | None) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._streams = streams
        self._since = since

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        peer: Peer = scope.get(PEER_KEY, NOBODY)
        if not self._streams.places.take(peer):
            refusal = problem.answer(
                "limit",
                "too many event streams are open",
                field="api.sse_subscribers",
                remedy="close one, or raise api.sse_subscribers",
            )
            await refusal(scope, receive, send)
            return
        writer = asyncio.create_task(self._write(send))
        leaver = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({writer, leaver}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        finally:
            self._streams.places.leave(peer)
            await _ended(writer, leaver)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._streams.chunks(self._since)) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                # A write seldom waits, and only the loop learns that the client has left: hear of it before the next.
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _frame(*, type: str, data: dict[str, Any], seq: int) -> bytes:
    number = f"id: {seq}\n" if seq else ""
    return f"{number}event: {type}\ndata: {json.dumps(data)}\n\n".encode()
