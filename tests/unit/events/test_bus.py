from __future__ import annotations

import asyncio

import pytest

from events.bus import RESYNC, Bus, Closed
from events.model import HostEvent, HostEventKind, Record, now


def record(seq):
    return Record(seq, now(), HostEvent(HostEventKind.CONNECTED, "libvirt"))


def test_every_subscriber_gets_every_record_in_order():
    async def run():
        bus = Bus()
        with bus.subscribe("a", size=4) as first, bus.subscribe("b", size=4) as second:
            for seq in (1, 2, 3):
                bus.publish(record(seq))
            return [[(await each.get(1)).seq for _ in range(3)] for each in (first, second)]

    assert asyncio.run(run()) == [[1, 2, 3], [1, 2, 3]]


def test_a_full_queue_loses_the_oldest_and_says_so_once_before_the_next():
    async def run():
        bus = Bus()
        with bus.subscribe("slow", size=2) as slow, bus.subscribe("fast", size=9):
            for seq in range(1, 6):
                bus.publish(record(seq))
            got = [await slow.get(1) for _ in range(3)]
            bus.publish(record(6))
            return [*got, await slow.get(1)], bus.dropped

    got, dropped = asyncio.run(run())
    assert [item if item is RESYNC else item.seq for item in got] == [RESYNC, 4, 5, 6]
    assert dropped == {"slow": 3, "fast": 0}


def test_a_drop_count_outlives_the_subscription():
    bus = Bus()
    for _ in range(2):
        with bus.subscribe("sse", size=1):
            bus.publish(record(1))
            bus.publish(record(2))
    assert bus.dropped == {"sse": 2}


def test_who_has_left_gets_nothing_more():
    async def run():
        bus = Bus()
        with bus.subscribe("a", size=2) as gone:
            pass
        bus.publish(record(1))
        await gone.get(1)

    with pytest.raises(Closed):
        asyncio.run(run())


def test_waiting_ends_with_the_time_or_with_a_record():
    async def run():
        bus = Bus()
        with bus.subscribe("a", size=2) as reader:
            with pytest.raises(TimeoutError):
                await reader.get(0.01)
            asyncio.get_running_loop().call_later(0.01, bus.publish, record(7))
            return (await reader.get(5)).seq

    assert asyncio.run(run()) == 7


def test_a_closed_bus_lets_its_subscribers_finish_reading():
    async def run():
        bus = Bus()
        reader = bus.subscribe("a", size=2)
        bus.publish(record(1))
        bus.close()
        bus.publish(record(2))
        late = bus.subscribe("late", size=1)
        return [item.seq async for item in reader], [item async for item in late]

    assert asyncio.run(run()) == ([1], [])


def test_a_subscription_that_can_hold_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Bus().subscribe("a", size=0)
