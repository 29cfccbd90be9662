"""Looks that do not return: how many threads they keep, and what becomes of what they find."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from pathlib import Path

import pytest

from hostagent.looks import MOST_HANGING, Late, Looks
from tests.unit.guests.fake_libvirt import play


def test_of_one_key_one_hangs_and_in_one_place_a_few() -> None:
    go, began = threading.Event(), list[str]()

    def hang(key: str) -> str:
        began.append(key)
        go.wait(20)
        return key

    async def story() -> None:
        looks, dropped = Looks(0.05), list[str]()
        keys = [str(number) for number in range(MOST_HANGING)]
        try:
            for key in [*keys, *keys]:
                with pytest.raises(Late):
                    await looks.look(key, lambda key=key: hang(key), drop=dropped.append)  # type: ignore[misc]
            assert began == keys
            with pytest.raises(Late):
                await looks.look("another", lambda: "not looked")
            assert await looks.look("another", lambda: "looked", place="elsewhere") == "looked"
            twice = [looks.look("twice", lambda: hang("twice"), place="there", drop=dropped.append) for _ in range(2)]
            assert all(isinstance(one, Late) for one in await asyncio.gather(*twice, return_exceptions=True))
        finally:
            go.set()
        while len(dropped) < len(keys) + 2:
            await asyncio.sleep(0.01)
        assert await looks.look("0", lambda: "again") == "again"

    play(story())


def test_one_whose_caller_goes_away_hangs_until_it_returns_and_an_error_is_its_callers(tmp_path: Path) -> None:
    go = threading.Event()

    async def story() -> None:
        looks = Looks(20)
        task = asyncio.ensure_future(looks.look("a", lambda: go.wait(20)))
        await asyncio.sleep(0.05)
        task.cancel()
        try:
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(Late):
                await looks.look("a", lambda: True)
        finally:
            go.set()
        await asyncio.sleep(0.1)
        with pytest.raises(FileNotFoundError):
            await looks.look("a", (tmp_path / "none").stat)
        assert await looks.look("a", lambda: True)

    play(story())


def test_what_was_found_for_a_caller_who_is_cancelled_in_that_moment_is_dropped() -> None:
    async def story() -> None:
        looks, found, had = Looks(20), list[int](), list[int]()

        def look(number: int) -> int:
            found.append(number)
            return number

        for number in range(100):
            task = asyncio.ensure_future(looks.look(number, functools.partial(look, number), drop=had.append))
            for _ in range(number % 8):
                await asyncio.sleep(0.0001)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                had.append(await task)
        await asyncio.sleep(0.2)
        assert sorted(had) == sorted(found)

    play(story())
