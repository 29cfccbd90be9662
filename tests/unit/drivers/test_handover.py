from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from hostagent.drivers.handover import LOST, Handover


def from_a_thread(call: Any) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()  # the loop stands still meanwhile: who tells does not wait for it


def test_things_come_in_order_on_the_loop_and_not_before_the_start() -> None:
    async def story() -> None:
        got: list[Any] = []
        handover: Handover[int] = Handover(got.append, size=1000)
        from_a_thread(lambda: [handover.put(n) for n in range(500)])
        await asyncio.sleep(0)
        assert got == []
        handover.start()
        async with asyncio.timeout(30):
            while len(got) < 500:
                await asyncio.sleep(0)
        from_a_thread(lambda: handover.put(500))
        async with asyncio.timeout(30):
            while len(got) < 501:
                await asyncio.sleep(0)
        assert got == list(range(501))
        assert handover.dropped == 0

    asyncio.run(story())


def test_what_does_not_fit_goes_and_its_place_is_marked() -> None:
    async def story() -> None:
        got: list[Any] = []
        handover: Handover[int] = Handover(got.append, size=3)
        handover.start()
        from_a_thread(lambda: [handover.put(n) for n in range(10)])
        async with asyncio.timeout(30):
            while len(got) < 4:
                await asyncio.sleep(0)
        assert got == [LOST, 7, 8, 9]
        assert handover.dropped == 7

    asyncio.run(story())


def test_a_receiver_that_fails_gets_the_next_one() -> None:
    async def story() -> None:
        faults: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context["exception"]))
        got: list[int] = []

        def receive(thing: Any) -> None:
            if thing == 1:
                raise ValueError("no")
            got.append(thing)

        handover: Handover[int] = Handover(receive, size=10)
        handover.start()
        from_a_thread(lambda: [handover.put(n) for n in range(4)])
        async with asyncio.timeout(30):
            while len(got) < 3:
                await asyncio.sleep(0)
        assert got == [0, 2, 3]
        assert [type(fault) for fault in faults] == [ValueError]

    asyncio.run(story())


@pytest.mark.parametrize("when", ["queued", "later"])
def test_nothing_comes_after_the_stop(when: str) -> None:
    async def story() -> None:
        got: list[Any] = []
        handover: Handover[int] = Handover(got.append, size=10)
        handover.start()
        if when == "queued":
            from_a_thread(lambda: handover.put(1))
        handover.stop()
        from_a_thread(lambda: handover.put(2))
        for _ in range(5):
            await asyncio.sleep(0)
        assert got == []

    asyncio.run(story())
