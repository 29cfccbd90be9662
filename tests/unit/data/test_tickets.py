"""Tickets in force: who may go on, what a revocation ends, and what is durable."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from hostagent.data.errors import HttpError
from hostagent.data.streams import Stopped
from hostagent.data.throttle import Lane, Rate
from hostagent.data.ticket import Spec
from hostagent.data.tickets import Operation, Ticket, Tickets, described

SPEC = Spec("id", 1000, ("read", "write"), 300, "mem:", 60, transfer_id="T")


class FakeHolder:
    """A connection; `deaf` does not end when it is told to."""

    def __init__(self, *, deaf: bool = False) -> None:
        self.stopped = threading.Event()
        self.freed = threading.Event()
        self.deaf = deaf
        self.ticket: Ticket | None = None

    def stop(self) -> None:
        self.stopped.set()

    def let_go(self) -> None:
        self.freed.set()
        if self.ticket is not None:
            self.ticket.left(self)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def tickets(told: list[str]) -> Tickets:
    lane = Rate(0)
    return Tickets(most=3, lane=lambda own: Lane(Rate(own), lane), told=lambda what, _, by: told.append(what))


def runs(ticket: Ticket, holder: FakeHolder, kind: str = "read", most: int = 8) -> Iterator[threading.Thread]:
    """A stream that goes on until it is stopped, unless it is deaf."""
    began = threading.Event()

    def work() -> None:
        with ticket.operation(Operation(kind, 0, 100), holder, most=most, wait=5):
            began.set()
            (threading.Event() if holder.deaf else holder.stopped).wait(5)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert began.wait(5)
    yield thread


def test_a_ticket_is_used_for_what_it_allows(tickets: Tickets) -> None:
    tickets.add(replace(SPEC, ops=("read",)), 1)
    assert tickets.use("id", "read").spec.size == 1000
    for ticket_id, op in (("id", "write"), ("other", "read")):
        with pytest.raises(HttpError) as refused:
            tickets.use(ticket_id, op)
        assert refused.value.status == 403
        assert refused.value.close
    tickets.add(replace(SPEC, uuid="none", ops=()), 1)
    with pytest.raises(HttpError, match="forbids read"):
        tickets.use("none", "read")


def test_a_removed_ticket_ends_what_runs_and_frees_what_waits(tickets: Tickets, told: list[str]) -> None:
    ticket = tickets.add(SPEC, 1)
    busy, idle = FakeHolder(), FakeHolder()
    ticket.join(idle)
    idle.ticket = ticket
    [thread] = runs(ticket, busy)
    began = time.monotonic()
    tickets.remove("id", 2)
    assert time.monotonic() - began < 2
    assert busy.stopped.is_set()
    assert idle.freed.is_set()
    thread.join(5)
    assert tickets.get("id") is None
    with pytest.raises(Stopped):
        ticket.check()
    tickets.remove("id", 2)  # once more is nothing
    assert told == ["granted", "revoked"]


def test_one_that_does_not_end_is_a_conflict_and_the_ticket_says_no(tickets: Tickets) -> None:
    ticket = tickets.add(SPEC, 1)
    [_] = runs(ticket, FakeHolder(deaf=True))
    with pytest.raises(HttpError, match="Timeout cancelling transfer T") as refused:
        tickets.remove("id", 0.05)
    assert refused.value.status == 409
    assert described(ticket)["canceled"]
    assert described(ticket)["active"]
    with pytest.raises(HttpError, match="was canceled"):
        tickets.use("id", "read")


def test_a_new_ticket_of_the_same_id_ends_what_the_old_one_runs(tickets: Tickets, told: list[str]) -> None:
    old = tickets.add(SPEC, 1)
    holder = FakeHolder()
    [thread] = runs(old, holder)
    new = tickets.add(replace(SPEC, size=5), 2)
    thread.join(5)
    assert holder.stopped.is_set()
    assert tickets.get("id") is new
    assert new.etag != old.etag
    assert told == ["granted", "revoked", "granted"]


def test_clearing_ends_everything_together(tickets: Tickets) -> None:
    holders = [FakeHolder() for _ in range(3)]
    threads = []
    for number, holder in enumerate(holders):
        threads += runs(tickets.add(replace(SPEC, uuid=f"t{number}"), 1), holder)
    tickets.clear(2)
    for thread in threads:
        thread.join(5)
    assert all(holder.stopped.is_set() for holder in holders)
    assert tickets.all() == []


def test_time_that_is_over_ends_what_runs_and_can_be_given_again(tickets: Tickets) -> None:
    ticket = tickets.add(replace(SPEC, timeout=0), 1)
    with pytest.raises(HttpError, match="Transfer=T expired"):
        tickets.use("id", "read")
    tickets.extend("id", 300)
    holder = FakeHolder()
    [thread] = runs(tickets.use("id", "read"), holder)
    tickets.extend("id", 0)
    with pytest.raises(Stopped):
        ticket.check()
    assert tickets.stop_expired(60) == 1
    thread.join(5)
    assert holder.stopped.is_set()
    tickets.extend("id", 300)
    tickets.use("id", "read")
    assert tickets.stop_expired(60) == 0


def test_in_use_are_tickets_that_are_not_over_and_those_with_which_something_runs(tickets: Tickets) -> None:
    assert tickets.in_use() == 0
    tickets.add(SPEC, 1)
    ticket = tickets.add(replace(SPEC, uuid="over"), 1)
    assert tickets.in_use() == 2
    holder = FakeHolder()
    [thread] = runs(ticket, holder)
    tickets.extend("over", 0)
    assert tickets.in_use() == 2
    holder.stopped.set()
    thread.join(5)
    assert tickets.in_use() == 1 and len(tickets.all()) == 2
    tickets.extend("over", 300)
    assert tickets.in_use() == 2


def test_each_success_begins_the_time_anew_but_not_one_that_is_over(tickets: Tickets) -> None:
    ticket = tickets.add(SPEC, 1)
    ticket.expires = before = time.monotonic() + 1
    ticket.succeeded()
    assert ticket.expires > before + 100
    ticket.expires = over = time.monotonic() - 1
    ticket.succeeded()
    assert ticket.expires == over


def test_more_than_the_house_holds_are_refused(tickets: Tickets) -> None:
    for number in range(3):
        tickets.add(replace(SPEC, uuid=f"t{number}"), 1)
    with pytest.raises(HttpError) as refused:
        tickets.add(replace(SPEC, uuid="one more"), 1)
    assert refused.value.status == 429
    tickets.add(replace(SPEC, uuid="t0"), 1)  # in place of one that is there


def test_no_more_than_may_write_at_a_time_and_a_further_one_has_its_turn(tickets: Tickets) -> None:
    ticket = tickets.add(SPEC, 1)
    first = FakeHolder()
    [thread] = runs(ticket, first, "write", most=1)
    with pytest.raises(HttpError) as refused, ticket.operation(Operation("write"), FakeHolder(), most=1, wait=0.05):
        pass
    assert refused.value.status == 503
    with ticket.operation(Operation("read"), FakeHolder(), most=1, wait=0):
        pass  # readers are counted apart
    first.stopped.set()
    with ticket.operation(Operation("write"), FakeHolder(), most=1, wait=5):
        thread.join(5)


def test_bytes_that_moved_are_counted_once(tickets: Tickets) -> None:
    ticket = tickets.add(replace(SPEC, ops=("read",)), 1)
    for offset, done in ((0, 10), (5, 10), (100, 1)):
        with ticket.operation(Operation("read", offset, done), FakeHolder(), most=8, wait=0) as op:
            op.done = done
    with ticket.operation(Operation("read", 200, 50), FakeHolder(), most=8, wait=0) as op:
        op.done = 7
        assert described(ticket)["transferred"] == 15 + 1 + 7
    assert "transferred" not in described(Ticket(SPEC, ticket.lane, 0))


def test_nobody_opens_anything_by_a_ticket_that_was_revoked(tickets: Tickets) -> None:
    ticket = tickets.add(SPEC, 1)
    holder = FakeHolder()
    ticket.join(holder)  # it is about to open its image, and does not hear that it is to let go
    with pytest.raises(HttpError) as stuck:
        tickets.remove("id", 0.05)
    assert stuck.value.status == 409
    ticket.left(holder)
    tickets.remove("id", 1)
    with pytest.raises(HttpError) as refused:
        ticket.join(FakeHolder())
    assert refused.value.status == 403


def test_a_ticket_whose_time_is_long_over_is_revoked_and_its_idle_holders_let_go(
    tickets: Tickets, told: list[str]
) -> None:
    ticket = tickets.add(replace(SPEC, timeout=1), 1)
    holder = FakeHolder()
    holder.ticket = ticket
    ticket.join(holder)
    ticket.expires = time.monotonic() - 5
    tickets.stop_expired(60)
    assert holder.freed.wait(5)
    assert tickets.get("id") is ticket
    tickets.stop_expired(1)
    assert tickets.get("id") is None
    assert told == ["granted", "revoked"]


def test_what_runs_for_long_by_a_ticket_that_drains_is_not_ended(tickets: Tickets, told: list[str]) -> None:
    ticket = tickets.add(replace(SPEC, drains=True), 1)
    holder = FakeHolder()
    [thread] = runs(ticket, holder)
    ticket.expires = time.monotonic() - 5000
    assert tickets.stop_expired(1) == 0
    assert tickets.get("id") is ticket
    assert not holder.stopped.is_set()
    holder.stopped.set()
    thread.join(5)
    tickets.use("id", "read")  # and from now on its time begins anew
    assert told == ["granted"]


class Hanging(FakeHolder):
    """Its file is on dead storage."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def let_go(self) -> None:
        self.released.wait(30)


def test_an_idle_file_that_cannot_be_closed_keeps_nobody_else_waiting(tickets: Tickets) -> None:
    hangs, other = Hanging(), FakeHolder()
    for name, holder in (("hangs", hangs), ("other", other)):
        holder.ticket = tickets.add(replace(SPEC, uuid=name, timeout=1), 1)
        holder.ticket.join(holder)
        holder.ticket.expires = time.monotonic() - 5
    began = time.monotonic()
    tickets.stop_expired(60)
    assert other.freed.wait(5)
    with pytest.raises(HttpError) as stuck:
        tickets.remove("hangs", 0.1)
    assert stuck.value.status == 409
    assert time.monotonic() - began < 10
    hangs.released.set()
