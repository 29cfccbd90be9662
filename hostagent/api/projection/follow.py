"""Keeps what is shown as the use-cases say it is, and tells the bus what has changed.

One task reads and tells; it never sends faster than the bus takes. Objects that change meanwhile are told of once, as
they are then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hostagent.api.projection import interface, objects
from hostagent.api.projection.message import Kind, Message, Variant, text
from hostagent.api.projection.pending import Key, Pending
from hostagent.api.projection.tree import KINDS, Shown, Tree, changed
from hostagent.api.usecases import Json, Service
from jobs.errors import JobError

PAGE = 500
GATHER = 0.05
"""Seconds in which changes are gathered before they are told."""
GRANTS = ("grants", "")
"""What stands for all grants: that the ledger may have changed is told as one."""
ACTIVE = ("queued", "starting", "running", "paused", "waiting", "ready", "completing", "aborting", "unknown")


@dataclass(frozen=True, slots=True)
class Settings:
    """Named as in the configuration: [dbus]."""

    refresh: float
    finished_time: float
    finished_count: int


class Follower:
    """`tell` sends a signal, and returns when the bus takes more."""

    def __init__(self, service: Service, tree: Tree, pending: Pending, settings: Settings) -> None:
        self._service = service
        self._tree = tree
        self._pending = pending
        self._settings = settings
        self._started_by: dict[str, int] = {}
        self._hidden = 0
        self._grants_said: dict[str, Json] = {}
        self._leaving: dict[str, float] = {}  # ended jobs by id, and when each goes (time.monotonic())
        self.tell: Callable[[Message], Awaitable[None]] = _nobody
        self.touched = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        refresh = time.monotonic() + self._settings.refresh
        while True:
            await self._until(refresh)
            if self._pending.everything or time.monotonic() >= refresh:
                await self.read_all()
                refresh = time.monotonic() + self._settings.refresh
            for key in self._pending.due():
                await self._renew(key)
            await self._let_go()

    async def _until(self, refresh: float) -> None:
        """Something is due."""
        now = time.monotonic()
        waits = [refresh - now, *([rest] if (rest := self._pending.rest()) is not None else [])]
        waits += [going - now for going in list(self._leaving.values())[:1]]
        if not self._pending.everything and (wait := min(waits)) > 0:
            self.touched.clear()
            try:
                async with asyncio.timeout(wait):
                    await self.touched.wait()
            except TimeoutError:
                return
        await asyncio.sleep(GATHER)

    async def read_all(self) -> None:
        """Everything anew. What is shown and was in no list may have moved from one to another: it is asked for."""
        self._pending.begin()
        seen: set[Key] = set()
        async for kind, value in self._everything():
            seen.add((kind, value["id"]))
            await self._put(kind, value, news=False)
            await asyncio.sleep(0)  # thousands of them, and others have their turn
        for kind in KINDS:
            for shown in self._tree.all(kind):
                if (kind, shown.id) not in seen:
                    await (self.drop(kind, shown.id) if kind == "grant" else self._renew((kind, shown.id)))

    async def _everything(self) -> AsyncIterator[tuple[str, Json]]:
        async for value in self._pages(self._exports):
            yield "export", value
        for state in ACTIVE:
            async for value in self._pages(partial(self._jobs, state)):
                yield "job", value
        finished = await self._jobs(None, self._settings.finished_count or 1, None)
        for value in reversed(finished["items"]):
            if value["state"] in objects.ENDED and self._stays(value) > 0:
                yield "job", value
        for value in await self._grants():
            yield "grant", value

    async def _pages(self, page: Callable[[int, str | None], Awaitable[Json]]) -> AsyncIterator[Json]:
        after: str | None = None
        while True:
            found = await page(PAGE, after)
            for value in found["items"]:
                yield value
            after = found["next"]
            if after is None:
                return

    async def _jobs(self, state: str | None, limit: int, after: str | None) -> Json:
        return await self._service.list_jobs(
            state=state, target=None, labels={}, origin=None, group=None, limit=limit, after=after
        )

    async def _exports(self, limit: int, after: str | None) -> Json:
        return await self._service.list_exports(state="running", target=None, labels={}, limit=limit, after=after)

    async def _grants(self) -> list[Json]:
        """As many as can be shown, and one."""
        found = await self._service.list_grants(path=None, holder=None, limit=self._tree.most + 1, after=None)
        items: list[Json] = found["items"]
        return items

    # One object

    async def show(self, kind: str, id: str, *, uid: int | None = None) -> None:
        """Now, whatever is due."""
        if uid is not None:
            self._started_by[id] = uid
        await self._renew((kind, id))

    async def _renew(self, key: Key) -> None:
        kind, id = key
        if key == GRANTS:
            values = await self._grants()
            for value in values:
                if self._grants_said.get(value["id"]) != value:  # of thousands, few have changed
                    await self._put("grant", value)
                    await asyncio.sleep(0)
            for gone in {one.id for one in self._tree.all("grant")} - {value["id"] for value in values}:
                await self.drop("grant", gone)
            return
        try:
            value = await (self._service.get_job(id) if kind == "job" else self._service.get_export(id))
        except JobError as error:
            if error.code != "not_found":
                raise
            await self.drop(kind, id)
        else:
            await self._put(kind, value)

    async def _put(self, kind: str, value: Json, *, news: bool = True) -> None:
        """Show it as `value` says. `news`: it has just come to that."""
        id = value["id"]
        before = self._tree.find(objects.path_of(kind, id))
        if before is None and kind == "job" and value["state"] in objects.ENDED and self._stays(value) <= 0:
            return
        if before is not None and kind != "grant" and value["revision"] < before["Revision"]:
            return  # somebody who read later was here first
        now = self._tree.put(kind, id, self._properties(kind, value))
        if now is None:
            await self._tell_hidden()
            return
        await self._tell(now, before)
        if kind == "grant":
            self._grants_said[id] = value
        if kind == "job":
            await self._job(now, before, value, news=news or before is not None)
        if kind == "export":
            if before is None:
                self._touch_jobs(now)
            if value["state"] not in objects.LIVE_EXPORTS:
                await self.drop(kind, id)

    def _properties(self, kind: str, value: Json) -> Json:
        match kind:
            case "job":
                uid = self._started_by.get(value["id"], objects.UNKNOWN_UID)
                return objects.job(value, exports=sorted(self._tree.exports_of(value["path"])), uid=uid)
            case "export":
                return objects.export(value)
            case _:
                return objects.grant(value)

    async def _job(self, now: Shown, before: Shown | None, value: Json, *, news: bool) -> None:
        if before is None and news:
            await self.tell(_signal(objects.ROOT, interface.MANAGER, "JobNew", text(now.id), now.path))
        if now["State"] not in objects.ENDED:
            return
        if news and (before is None or before["State"] not in objects.ENDED):
            success = now["State"] == "completed"
            message = "" if success else now["ErrorMessage"] or now["State"]
            await self.tell(_signal(now.path, interface.JOB, "Completed", success, message))
            await self.tell(
                _signal(
                    objects.ROOT, interface.MANAGER, "JobRemoved", text(now.id), now.path, now["Target"], now["State"]
                )
            )
        self._leaving.setdefault(now.id, time.monotonic() + max(0.0, self._stays(value)))

    def _stays(self, value: Json) -> float:
        """Seconds for which an ended job is still shown."""
        ended = objects.micros(value["finished"]) / 1e6
        return min(self._settings.finished_time, ended + self._settings.finished_time - time.time())

    async def _let_go(self) -> None:
        """Ended jobs whose time is over, or that are too many."""
        now = time.monotonic()
        for id, going in list(self._leaving.items()):
            if going > now and len(self._leaving) <= self._settings.finished_count:
                return
            await self.drop("job", id)

    async def drop(self, kind: str, id: str) -> None:
        self._pending.forget((kind, id))
        self._started_by.pop(id, None)
        self._leaving.pop(id, None)
        self._grants_said.pop(id, None)
        hidden = (kind, id) in self._tree.hidden
        gone = self._tree.remove(kind, id)
        if hidden:
            await self._tell_hidden()
        if gone is not None:
            if kind == "export":
                self._touch_jobs(gone)
            body = (gone.path, [gone.interface])
            await self.tell(_signal("/", interface.OBJECT_MANAGER, "InterfacesRemoved", *body))

    def _touch_jobs(self, export: Shown) -> None:
        """Jobs on an image say which exports it has."""
        for job in self._tree.all("job"):
            if job["Path"] == export["Path"] and job["State"] not in objects.ENDED:
                self._pending.touch(("job", job.id), job["State"])

    # Telling

    async def _tell(self, now: Shown, before: Shown | None) -> None:
        if before is None:
            added = {now.interface: now.values}
            await self.tell(_signal("/", interface.OBJECT_MANAGER, "InterfacesAdded", now.path, added))
        elif news := changed(now, before):
            await self._properties_changed(now.path, now.interface, news)

    async def _tell_hidden(self) -> None:
        if len(self._tree.hidden) == self._hidden:
            return
        self._hidden = len(self._tree.hidden)
        await self._properties_changed(objects.ROOT, interface.MANAGER, {"Hidden": self._tree.manager.values["Hidden"]})

    async def _properties_changed(self, path: str, name: str, news: dict[str, Variant]) -> None:
        await self.tell(_signal(path, interface.PROPERTIES, "PropertiesChanged", name, news, []))


async def _nobody(message: Message) -> None:
    """There is no bus to tell."""


def _signal(path: str, name: str, member: str, *body: Any) -> Message:
    message = Message(Kind.SIGNAL, path=path, interface=name, member=member, body=body)
    return replace(message, signature=interface.ALL[name].signals[member])
