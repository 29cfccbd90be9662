"""The tickets in force, and what is under way with each of them.

One lock a ticket; nothing that waits is done under it. Revocation is one path, whatever asks for it (DELETE, another
ticket of the same id, DELETE of all, the end of its time, the daemon's stop): the ticket says no from then on, the
sockets of what is running are shut down and their backends fenced, so that they end within a bounded time whatever they
wait for; and what only holds a backend open gives it back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from hostagent.data.durability import Durability
from hostagent.data.errors import HttpError, not_allowed
from hostagent.data.streams import Stopped
from hostagent.data.throttle import Lane
from hostagent.data.ticket import Spec
from hostagent.rangeset import RangeSet

MOMENT = 0.05
"""Seconds for what an expired ticket still has open; what takes longer is seen to at the next look."""


class Holder(Protocol):
    """A connection that has used a ticket, as the ticket knows it."""

    def stop(self) -> None:
        """End what runs, at once, from another thread: the socket and the backend. Idempotent."""

    def let_go(self) -> None:
        """Give back the backend, if it is not in use; else as `stop`."""


@dataclass(eq=False, slots=True)
class Operation:
    """One request that moves bytes. `done` grows as they move; only its own thread writes it."""

    kind: str
    offset: int = 0
    length: int = 0
    done: int = 0


@dataclass(eq=False)
class Ticket:
    spec: Spec
    lane: Lane
    expires: float
    """On the monotonic clock."""
    canceled: bool = False
    closing: bool = False
    """Nothing begins any more; what runs goes on."""
    gone: bool = False
    """It was revoked, and no other word of it stays."""
    touched: float = field(default_factory=time.monotonic)
    holders: set[Holder] = field(default_factory=set)
    running: dict[Operation, Holder] = field(default_factory=dict)
    moved: RangeSet = field(default_factory=RangeSet)
    durability: Durability = field(default_factory=Durability)
    etag: str = ""
    """Of the same image by the same ticket: so it is again what it was when a caller gives the ticket anew to a daemon
    that was killed, and clients go on."""
    shared: dict[str, Any] = field(default_factory=dict)
    """What connections of this ticket share, such as a map; `close` of each is called with the ticket's end."""

    def __post_init__(self) -> None:
        known = json.dumps([self.spec.uuid, self.spec.url, self.spec.size, self.spec.transfer_id])
        self.etag = hashlib.sha256(known.encode()).hexdigest()[:24]
        self.lock = threading.Lock()
        self.turned = threading.Condition(self.lock)

    @property
    def over(self) -> bool:
        """Whether its time is. Of one that drains it never is while something runs."""
        return time.monotonic() >= self.expires and not (self.spec.drains and self.running)

    def refuse(self, op: str | None) -> None:
        """HttpError 403 unless `op` (read, write; None: any) is allowed now."""
        name = self.spec.name
        if self.canceled or self.closing:
            raise not_allowed(f"Transfer {name} was canceled")
        if self.over:
            raise not_allowed(f"Transfer={name} expired")
        if (op == "write" and not self.spec.writable) or (op == "read" and not self.spec.readable):
            raise not_allowed(f"Transfer={name} forbids {op}")

    @contextlib.contextmanager
    def operation(self, op: Operation, holder: Holder, *, most: int, wait: float) -> Iterator[Operation]:
        """While it runs it can be stopped. `most` of its kind run at a time: a further one waits up to `wait` s."""
        limit = time.monotonic() + wait
        with self.turned:
            self.refuse(op.kind)
            while sum(one.kind == op.kind for one in self.running) >= most:
                if not self.turned.wait(max(0.0, limit - time.monotonic())) and time.monotonic() >= limit:
                    raise HttpError(
                        503,
                        f"Transfer {self.spec.name} has {most} connections that {op.kind} already",
                        code="limit",
                        remedy="keep to max_readers and max_writers of OPTIONS",
                        headers=(("retry-after", "1"),),
                        close=True,
                    )
                self.refuse(op.kind)
            self.running[op] = holder
        try:
            yield op
        finally:
            with self.turned:
                del self.running[op]
                if op.done:
                    self.moved.add(op.offset, op.offset + op.done)
                if self.spec.drains:
                    self.expires = time.monotonic() + self.spec.timeout
                self.turned.notify_all()

    def succeeded(self) -> None:
        """An operation was completed: the time begins anew, unless it was over before."""
        with self.lock:
            now = self.touched = time.monotonic()
            if not self.canceled and now < self.expires:
                self.expires = now + self.spec.timeout

    def check(self) -> None:
        """For a stream that moves: Stopped when it may not go on."""
        if self.canceled or self.over:
            raise Stopped(self.spec.name)

    def transferred(self) -> int | None:
        """Bytes that have moved, each counted once; None where both directions are allowed."""
        if len(self.spec.ops) != 1:
            return None
        with self.lock:
            moved = self.moved.copy()
            for op in self.running:
                moved.add(op.offset, op.offset + op.done)
        return len(moved)

    @property
    def state(self) -> str:
        if self.canceled:
            return "canceled"
        if self.over:
            return "expired"
        return "active" if self.running else "idle"

    def idle_time(self) -> int:
        with self.lock:
            return 0 if self.running else int(time.monotonic() - self.touched)

    def drain(self, wait: float) -> None:
        """Nothing new begins; what runs gets `wait` s to end."""
        limit = time.monotonic() + wait
        with self.turned:
            self.closing = True
            while self.running and (left := limit - time.monotonic()) > 0:
                self.turned.wait(left)

    def cancel(self, wait: float) -> bool:
        """No more, now. Whether all that ran has ended, within `wait` s."""
        limit = time.monotonic() + wait
        with self.turned:
            self.canceled = True
            self.turned.notify_all()
            running, idle = set(self.running.values()), self.holders - set(self.running.values())
        for holder in running:
            holder.stop()
        _let_go(idle)
        with self.turned:
            while (self.running or self.holders) and (left := limit - time.monotonic()) > 0:
                self.turned.wait(left)
            done = not (self.running or self.holders)
        if done:
            self._close_shared()
        return done

    def _close_shared(self) -> None:
        with self.lock:
            shared, self.shared = list(self.shared.values()), {}
        for one in shared:
            with contextlib.suppress(OSError):
                one.close()

    def join(self, holder: Holder) -> None:
        """Before it opens anything: so whoever revokes the ticket knows of it. HttpError 403 when that has been."""
        with self.lock:
            self.refuse(None)
            self.holders.add(holder)

    def left(self, holder: Holder) -> None:
        """It has nothing open any more."""
        with self.turned:
            self.holders.discard(holder)
            self.turned.notify_all()


class Tickets:
    """`given` is what a new ticket of that id shares from the beginning. `told` hears of each grant, extension and
    revocation (the audit): granted, extended, revoked, and stuck for a revocation that did not end what runs in time;
    `by` is who asked. Bounded by `most`."""

    def __init__(
        self,
        *,
        most: int,
        lane: Callable[[int], Lane],
        told: Callable[[str, Ticket, str], None],
        given: Callable[[str], dict[str, Any]] = lambda _: {},
    ) -> None:
        self._most = most
        self._lane = lane
        self._told = told
        self._given = given
        self._tickets: dict[str, Ticket] = {}
        self._lock = threading.Lock()

    def get(self, ticket_id: str) -> Ticket | None:
        return self._tickets.get(ticket_id)

    def use(self, ticket_id: str, op: str | None) -> Ticket:
        """The ticket, if `op` is allowed by it; HttpError 403."""
        ticket = self._tickets.get(ticket_id)
        if ticket is None:
            raise not_allowed("No such ticket")
        ticket.refuse(op)
        return ticket

    def all(self) -> list[Ticket]:
        with self._lock:
            return list(self._tickets.values())

    def in_use(self) -> int:
        """How many somebody may use, or uses. One whose time is over is kept to be extended, and holds up nothing."""
        return sum(bool(one.running) or not (one.canceled or one.over) for one in self.all())

    def add(self, spec: Spec, wait: float, by: str = "") -> Ticket:
        """A ticket of the same id is revoked first: HttpError 409 if what it runs does not end within `wait` s."""
        ticket = Ticket(spec, self._lane(spec.rate), time.monotonic() + spec.timeout)
        while True:
            with self._lock:
                old = self._tickets.get(spec.uuid)
                if old is None:
                    if len(self._tickets) >= self._most:
                        message = f"There are {self._most} tickets already (data.tickets)"
                        raise HttpError(429, message, remedy="delete those that are not needed")
                    ticket.shared = self._given(spec.uuid)
                    self._tickets[spec.uuid] = ticket
                    break
            self._revoke(old, wait, by)
        self._told("granted", ticket, by)
        return ticket

    def extend(self, ticket_id: str, timeout: int, by: str = "") -> None:
        ticket = self._tickets.get(ticket_id)
        if ticket is None:
            raise HttpError(404, "No such ticket")
        with ticket.lock:
            ticket.expires = time.monotonic() + timeout
        self._told("extended", ticket, by)

    def remove(self, ticket_id: str, wait: float, by: str = "", *, drain: float = 0) -> None:
        """Idempotent. HttpError 409 when what it runs does not end within `wait` s: it stays, and says no. With `drain`
        what runs may first go on for so many seconds."""
        ticket = self._tickets.get(ticket_id)
        if ticket is not None:
            if drain:
                ticket.drain(drain)
            self._revoke(ticket, wait, by)

    def clear(self, wait: float, by: str = "") -> None:
        """All of them, together within `wait` s."""
        limit = time.monotonic() + wait
        stuck: HttpError | None = None
        for ticket in self.all():
            with ticket.lock:
                ticket.canceled = True
        for ticket in self.all():
            try:
                self._revoke(ticket, max(0.0, limit - time.monotonic()), by)
            except HttpError as error:
                stuck = error
        if stuck is not None:
            raise stuck

    def _revoke(self, ticket: Ticket, wait: float, by: str) -> None:
        if not ticket.cancel(wait):
            self._told("stuck", ticket, by)
            message = f"Timeout cancelling transfer {ticket.spec.name}"
            raise HttpError(409, message, code="timeout", remedy="ask again: its operations are being ended")
        with self._lock:
            if self._tickets.get(ticket.spec.uuid) is ticket:
                del self._tickets[ticket.spec.uuid]
        if not ticket.gone:
            ticket.gone = True
            self._told("revoked", ticket, by)

    def stop_expired(self, keep: float) -> int:
        """End what tickets run whose time is over; how many there were. They stay for `keep` s, to be extended."""
        ended = 0
        for ticket in self.all():
            with ticket.lock:
                over = ticket.over
                running = set(ticket.running.values()) if over else set()
                idle = ticket.holders - running if over else set()
            for holder in running:
                holder.stop()
            _let_go(idle)
            ended += bool(running)
            if over and time.monotonic() - ticket.expires > keep:
                with contextlib.suppress(HttpError):
                    self._revoke(ticket, MOMENT, "its time")
        return ended


def _let_go(holders: set[Holder]) -> None:
    """Their files and connections are closed, which may take as long as dead storage: nobody else waits for that."""

    def close() -> None:
        for holder in holders:
            holder.let_go()

    if holders:
        threading.Thread(target=close, name="let-go", daemon=True).start()


def described(ticket: Ticket) -> dict[str, Any]:
    """As GET /tickets/{id} answers."""
    spec = ticket.spec
    with ticket.lock:
        active, connections = bool(ticket.running), len(ticket.holders)
    found: dict[str, Any] = {
        "active": active,
        "canceled": ticket.canceled,
        "connections": connections,
        "expires": int(ticket.expires),
        "idle_time": ticket.idle_time(),
        "inactivity_timeout": spec.inactivity_timeout,
        "ops": list(spec.ops),
        "size": spec.size,
        "sparse": spec.sparse,
        "dirty": spec.dirty,
        "timeout": spec.timeout,
        "url": spec.url,
        "uuid": spec.uuid,
        "transfer_id": spec.transfer_id,
        "expires_in": max(0, int(ticket.expires - time.monotonic())),
    }
    if spec.filename is not None:
        found["filename"] = spec.filename
    if (transferred := ticket.transferred()) is not None:
        found["transferred"] = transferred
    return found
