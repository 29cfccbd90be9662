"""Bandwidth: the promise of a rate, and turns between tickets. The clock is a fake one."""

from __future__ import annotations

import threading
import time

import pytest

from hostagent.data.streams import Stopped
from hostagent.data.throttle import BURST, Lane, Rate


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_promises_bytes_one_after_the_other() -> None:
    clock = Clock()
    rate = Rate(1000, clock)
    waits = [rate.due(500) for _ in range(5)]
    assert waits == pytest.approx([0, 0.5 - BURST, 1 - BURST, 1.5 - BURST, 2 - BURST])


def test_an_idle_time_is_caught_up_for_a_moment_only() -> None:
    clock = Clock()
    rate = Rate(1000, clock)
    rate.due(1000)
    clock.now += 3600
    assert rate.due(100) == 0
    assert rate.due(1000) == 0
    assert rate.due(1000) > 0.9


def test_no_rate_is_no_limit() -> None:
    assert Rate(0).due(1 << 60) == 0
    assert not Lane(Rate(0), Rate(0)).limited


def test_who_waits_can_be_stopped() -> None:
    def stopped() -> None:
        raise Stopped("revoked")

    lane = Lane(Rate(1), Rate(0))
    lane.take(1, lambda: None)
    began = time.monotonic()
    with pytest.raises(Stopped):
        lane.take(1000, stopped)
    assert time.monotonic() - began < 5


def test_a_ticket_with_many_connections_has_no_more_of_the_host_than_another() -> None:
    host = Rate(2_000_000)
    moved = {"many": 0, "one": 0}
    lanes = {name: Lane(Rate(0), host) for name in moved}
    end = time.monotonic() + 1.5
    lock = threading.Lock()

    def work(name: str) -> None:
        while time.monotonic() < end:
            lanes[name].take(10_000, lambda: None)
            with lock:
                moved[name] += 10_000

    threads = [threading.Thread(target=work, args=(name,)) for name in ["many"] * 8 + ["one"]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert moved["one"] > 0.3 * moved["many"]
    assert sum(moved.values()) < 3 * 2_000_000 * 1.5
