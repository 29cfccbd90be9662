"""What comes in for a job is taken in an order that lets nobody starve."""

from __future__ import annotations

import asyncio

from jobs.inbox import SIZE, Ask, Inbox


def test_hints_are_one_look_however_many_came() -> None:
    async def run() -> list[Ask]:
        inbox = Inbox()
        for _ in range(3 * SIZE):
            inbox.hint()
        taken = []
        while message := await inbox.next(0.01):
            taken.append(message.ask)
        return taken

    assert asyncio.run(run()) == [Ask.LOOK]


def test_a_hint_that_comes_after_a_look_began_is_another_look() -> None:
    async def run() -> int:
        inbox = Inbox()
        looks = 0
        for _ in range(2):
            inbox.hint()
            looks += (await inbox.next(0.01)) is not None
        return looks

    assert asyncio.run(run()) == 2


def test_who_asks_goes_before_a_hint_that_came_first_and_the_hint_is_not_lost() -> None:
    """A look waits as long as the storage daemon does not answer: an abort by force must not stand behind it."""

    async def run() -> list[Ask]:
        inbox = Inbox()
        inbox.hint()
        asking = [asyncio.ensure_future(inbox.ask(ask, None, 5, "job")) for ask in (Ask.FORCE, Ask.PAUSE)]
        await asyncio.sleep(0)
        taken = []
        while message := await inbox.next(0.01):
            taken.append(message.ask)
        for task in asking:
            task.cancel()
        return taken

    assert asyncio.run(run()) == [Ask.FORCE, Ask.PAUSE, Ask.LOOK]
