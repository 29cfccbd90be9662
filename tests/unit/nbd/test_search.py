"""The search for images that stand on a file, where storage hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

from hostagent.nbd.operations import SEARCHES, Dependent, Search, dependents
from jobs.errors import JobError
from jobs.model import FileId


def test_searches_that_hang_end_and_take_no_thread_from_others() -> None:
    answers = threading.Event()

    def hang(files: Collection[FileId], *, folders: Sequence[Path], skip: Collection[FileId]) -> Sequence[Dependent]:
        answers.wait(60)
        return []

    async def scenario() -> None:
        search = Search(hang, 0.05)
        asked = [dependents(search, [], folders=[Path("/dead")], skip=[]) for _ in range(SEARCHES + 2)]
        async with asyncio.timeout(30):
            refused = await asyncio.gather(*asked, return_exceptions=True)
            await asyncio.to_thread(lambda: None)
        assert {isinstance(error, JobError) and error.code for error in refused} == {"timeout"}
        assert "/dead" in str(refused[0])
        answers.set()
        with pytest.raises(TypeError):  # what the search itself says is told
            await Search(lambda *words, **more: len(None), 30.0)([], folders=[], skip=[])  # type: ignore[arg-type]

    try:
        asyncio.run(scenario())
    finally:
        answers.set()


def test_what_was_searched_keeps_no_thread_after_the_end() -> None:
    """The process would wait for it."""

    def find(files: Collection[FileId], *, folders: Sequence[Path], skip: Collection[FileId]) -> Sequence[Dependent]:
        found.append(threading.current_thread())
        return []

    async def scenario() -> None:
        assert list(await search([], folders=[], skip=[])) == []

    found: list[threading.Thread] = []
    search = Search(find, 10)
    asyncio.run(scenario())
    search.close()
    found[0].join(20)
    assert not found[0].is_alive()
