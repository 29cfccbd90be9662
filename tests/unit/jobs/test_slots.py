from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobs.group import Together
from jobs.model import Group, State
from jobs.slots import Slots


def test_who_came_first_is_served_first() -> None:
    async def scenario() -> None:
        slots, served = Slots(1), []

        async def work(name: int) -> None:
            await slots.take()
            served.append(name)
            slots.give()

        await slots.take()
        waiting = [asyncio.create_task(work(n)) for n in range(5)]
        await asyncio.sleep(0)
        slots.give()
        await asyncio.gather(*waiting)
        assert served == [0, 1, 2, 3, 4]

    asyncio.run(scenario())


@example(["take", "take", "tick", "give", "cancel"], 1)  # given, and cancelled before it could know
@given(
    st.lists(st.sampled_from(["take", "give", "cancel", "tick", "occupy", "close", "open"]), max_size=40),
    st.integers(1, 3),
)
def test_slots_neither_leak_nor_multiply(steps: list[str], width: int) -> None:
    """Whatever is taken, cancelled at any moment and given back: in the end there are as many as there were."""

    async def scenario() -> None:
        slots = Slots(width)
        tasks: list[asyncio.Task[None]] = []
        occupied = given = 0
        for step in steps:
            holders = [task for task in tasks if task.done() and not task.cancelled()]
            assert len(holders) - given <= width
            if step == "take":
                tasks.append(asyncio.create_task(slots.take()))
            elif step == "give" and len(holders) > given:
                slots.give()
                given += 1
            elif step == "cancel" and tasks:
                tasks[-1].cancel()
            elif step == "occupy":
                slots.occupy()
                occupied += 1
            elif step == "close":
                slots.close()
            elif step == "open":
                slots.open()
            else:
                await asyncio.sleep(0)
        slots.open()
        for _ in range(occupied):
            slots.give()
        for _ in range(2 * len(tasks) + 2):
            await asyncio.sleep(0)
            while len([task for task in tasks if task.done() and not task.cancelled()]) > given:
                slots.give()
                given += 1
        assert all(task.done() for task in tasks)
        again = [asyncio.create_task(slots.take()) for _ in range(width + 1)]
        for _ in range(3):
            await asyncio.sleep(0)
        assert [task.done() for task in again] == [True] * width + [False]
        again[-1].cancel()

    asyncio.run(scenario())


def test_closed_slots_let_nobody_in_and_keep_their_order() -> None:
    async def scenario() -> None:
        slots, served = Slots(2), []

        async def work(name: int) -> None:
            await slots.take()
            served.append(name)

        await slots.take()
        slots.close()
        waiting = [asyncio.create_task(work(n)) for n in range(3)]
        await asyncio.sleep(0)
        slots.give()
        await asyncio.sleep(0)
        assert served == []
        slots.open()
        await asyncio.wait(waiting[:2])
        assert served == [0, 1]
        assert not waiting[2].done()
        waiting[2].cancel()

    asyncio.run(scenario())


@example([3, 1, 2, -1, 1], 3)
@given(st.lists(st.integers(1, 3) | st.just(-1), max_size=30), st.integers(3, 5))
def test_many_are_let_in_at_once_or_not_at_all_and_in_their_order(steps: list[int], width: int) -> None:
    """A number takes as many, -1 cancels the last that waits. Nobody overtakes, and all come in in the end."""

    async def scenario() -> None:
        slots, holding, served = Slots(width), 0, []
        tasks: list[asyncio.Task[None]] = []

        async def work(name: int, number: int) -> None:
            nonlocal holding
            await slots.take(number)
            holding += number
            assert holding <= width
            served.append(name)
            await asyncio.sleep(0)
            holding -= number
            for _ in range(number):
                slots.give()

        for n, step in enumerate(steps):
            if step > 0:
                tasks.append(asyncio.create_task(work(n, step)))
            elif tasks and len(served) < len(tasks):
                tasks[-1].cancel()
            await asyncio.sleep(0)
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        assert all(task.done() for task in tasks)
        assert served == sorted(served)
        await asyncio.wait_for(slots.take(width), 5)

    asyncio.run(scenario())


@pytest.mark.parametrize("ticks", range(6))
def test_a_member_that_leaves_while_its_group_gets_its_slots_takes_none_away(ticks: int) -> None:
    async def scenario() -> None:
        world: Any = SimpleNamespace(slots=Slots(2), limits=SimpleNamespace(width=2))
        group = Together(world, Group("g", ("a", "b")), {})
        for name in ("a", "b"):
            job = SimpleNamespace(id=name, started=None, state=State.QUEUED, intent=None, error=None)
            member: Any = SimpleNamespace(job=job)
            group.join(member)
        await world.slots.take(2)
        members = [asyncio.create_task(group.slot(name)) for name in ("a", "b")]
        for _ in range(5):
            await asyncio.sleep(0)
        world.slots.give()
        world.slots.give()
        for _ in range(ticks):
            await asyncio.sleep(0)
        for member in members:
            member.cancel()
            await asyncio.sleep(0)
        for ended in await asyncio.gather(*members, return_exceptions=True):
            if ended is None:  # it has its slot, and is to give it back
                world.slots.give()
        await asyncio.wait_for(world.slots.take(2), 1)

    asyncio.run(scenario())
