"""Workers, with connections that a test holds up. What real hung guests do is in tests/libvirt."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hostagent.drivers.calls import Late, Outcome, Workers
from jobs.errors import JobError

WAIT = 30.0


class Broken(JobError):
    pass


class Connection:
    def __init__(self) -> None:
        self.alive = True
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Net:
    """Makes connections, and counts them."""

    def __init__(self) -> None:
        self.made: list[Connection] = []

    def connect(self) -> Connection:
        self.made.append(Connection())
        return self.made[-1]


def left(_: asyncio.Future[Outcome]) -> None:
    pass


async def run(workers: Workers[Any], call: Callable[[Any], Any], timeout: float = WAIT, what: str = "it") -> Any:
    return await workers.run(call, what=what, timeout=timeout, left=left)


def test_a_worker_is_used_again_and_so_is_its_connection() -> None:
    async def story() -> None:
        net = Net()
        workers = Workers(4, net.connect, Broken)
        assert [await run(workers, lambda _, n=n: n) for n in range(10)] == list(range(10))
        assert len(net.made) == 1
        workers.close()

    asyncio.run(story())


def test_calls_run_at_the_same_time_up_to_the_limit() -> None:
    async def story() -> None:
        net = Net()
        workers = Workers(3, net.connect, Broken)
        meeting = threading.Barrier(3)
        await asyncio.gather(*(run(workers, lambda _: meeting.wait(WAIT)) for _ in range(6)))
        assert len(net.made) == 3
        workers.close()

    asyncio.run(story())


@pytest.mark.parametrize("found", ["before the call", "in it"])
def test_a_broken_connection_is_made_anew(found: str) -> None:
    async def story() -> None:
        net = Net()
        workers = Workers(1, net.connect, Broken)
        await run(workers, lambda connection: None)
        if found == "in it":

            def breaks(_: Any) -> None:
                raise Broken("unavailable", "gone")

            with pytest.raises(Broken):
                await run(workers, breaks)
        else:
            net.made[0].alive = False
        assert await run(workers, lambda connection: connection) is net.made[1]
        assert net.made[0].closed
        workers.close()

    asyncio.run(story())


def test_a_late_call_keeps_its_worker_until_it_returns() -> None:
    async def story() -> None:
        workers = Workers(1, Net().connect, Broken)
        go_on = threading.Event()
        told: list[asyncio.Future[Outcome]] = []
        with pytest.raises(Late):
            await workers.run(lambda _: go_on.wait(WAIT), what="first", timeout=0.05, left=told.append)
        with pytest.raises(JobError) as refused:
            await run(workers, lambda _: None)  # at once: nobody is coming back
        assert refused.value.code == "unavailable" and "first" in refused.value.message
        go_on.set()
        assert (await asyncio.wait_for(told[0], WAIT)) == (True, None)
        assert await run(workers, lambda _: 7) == 7
        workers.close()

    asyncio.run(story())


def test_who_finds_all_taken_waits_for_so_long_as_it_has() -> None:
    async def story() -> None:
        workers = Workers(1, Net().connect, Broken)
        go_on = threading.Event()
        first = asyncio.create_task(run(workers, lambda _: go_on.wait(WAIT), what="first"))
        await asyncio.sleep(0)
        with pytest.raises(JobError) as refused:
            await run(workers, lambda _: None, timeout=0.05)
        assert refused.value.code == "unavailable" and "first" in refused.value.message
        second = asyncio.create_task(run(workers, lambda _: 2))
        go_on.set()
        assert await first is True
        assert await second == 2
        workers.close()

    asyncio.run(story())


def test_a_call_whose_caller_left_still_counts() -> None:
    async def story() -> None:
        workers = Workers(1, Net().connect, Broken)
        go_on = threading.Event()
        told: list[asyncio.Future[Outcome]] = []
        call = workers.run(lambda _: go_on.wait(WAIT), what="first", timeout=WAIT, left=told.append)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call, 0.05)
        assert len(told) == 1
        assert [what for what, _ in workers.under_way] == ["first"]
        go_on.set()
        await asyncio.wait_for(told[0], WAIT)
        await asyncio.sleep(0)
        assert workers.under_way == []
        workers.close()

    asyncio.run(story())


def test_a_fault_of_a_call_is_its_callers() -> None:
    async def story() -> None:
        workers = Workers(1, Net().connect, Broken)
        with pytest.raises(ZeroDivisionError):
            await run(workers, lambda _: 1 // 0)
        assert await run(workers, lambda _: 1) == 1
        workers.close()

    asyncio.run(story())
