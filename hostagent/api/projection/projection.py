"""The agent on a bus, for as long as the agent runs: connected, shown, and connected anew whenever that breaks.

Nothing here is waited for by anybody: the agent says what has changed (`touch`), and whether the bus hears of it makes
no difference to any job.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from hostagent import __version__
from hostagent.api import dbus
from hostagent.api.audited import Tell
from hostagent.api.projection import follow, front, interface, objects
from hostagent.api.projection.follow import Follower
from hostagent.api.projection.message import BusError, Message, to_bus
from hostagent.api.projection.pending import Pending
from hostagent.api.projection.tree import Tree
from hostagent.api.projection.wire import Closed, Limits, Wire, unix_path
from hostagent.api.usecases import Service
from hostagent.config import Dbus
from hostagent.errors import AgentError
from jobs.errors import JobError

log = logging.getLogger(__name__)

SYSTEM = "unix:path=/run/dbus/system_bus_socket"
DO_NOT_QUEUE = 4
OWNER = 1
"""RequestName: fail rather than wait for the name; and the answer when it is ours."""
FAREWELL = 1.0
"""Seconds for the last answers, when the agent stops."""


def address_of(setting: str) -> tuple[str | None, str]:
    """The address that a `dbus.address` means, None for none, and why there is none."""
    match setting:
        case "off":
            return None, "off (dbus.address)"
        case "auto" if os.geteuid() != 0:
            return None, 'off: a plain user\'s agent is on no bus unless dbus.address says so ("session")'
        case "auto" | "system":
            return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM, ""
        case "session":
            run = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
            return os.environ.get("DBUS_SESSION_BUS_ADDRESS") or f"unix:path={run}/bus", ""
        case _:
            return setting, ""


@dataclass(slots=True)
class State:
    """`why` there is no connection; `absent`: there is no such bus on this host."""

    connected: bool = False
    name: str = ""
    why: str = "not connected yet"
    absent: bool = False


class Projection:
    """`never` are uids that may not use the agent, whatever polkit says."""

    def __init__(self, config: Dbus, *, host: str, never: Callable[[], Collection[int]]) -> None:
        self._config = config
        self._never = never
        self._facts = {"Version": __version__, "Host": host}
        self._address, off = address_of(config.address)
        if self._address is not None:
            unix_path(self._address)
        self.state = State(why=off) if off else State()
        self._missing = dbus.absent() if self._address is not None else None
        self._pending = Pending(config.queue, config.interval, time.monotonic)
        self._follower: Follower | None = None

    @property
    def on(self) -> bool:
        return self._address is not None and self._missing is None

    @property
    def dropped(self) -> int:
        """States that were never told, for newer ones came before the bus took them."""
        return self._pending.dropped

    def touch(self, kind: str, id: str, state: str) -> None:
        """An object has changed, and is in this state now."""
        if self._follower is not None:  # a later connection begins with reading everything
            self._pending.touch((kind, id), state)
            self._follower.touched.set()

    def check(self) -> dict[str, Any]:
        """For readiness, which the bus is no condition of."""
        if self._missing is not None:
            remedy = f'install {dbus.PACKAGE} (pip install "hostagent[dbus]"), or set dbus.address to off'
            return {"ok": True, "detail": f"off: {self._missing}", "remedy": remedy}
        if self.state.connected:
            return {"ok": True, "detail": f"connected as {interface.NAME} ({self.state.name}) to {self._address}"}
        if not self.on or (self.state.absent and self._config.address == "auto"):
            return {"ok": True, "detail": self.state.why}
        return {"ok": True, "detail": f"not connected: {self.state.why}", "remedy": "it is tried again by itself"}

    async def run(self, service: Service, audit: Tell) -> None:
        """Until cancelled. `audit` hears of what callers were kept from."""
        if not self.on:
            if self._missing is not None:
                log.warning("no D-Bus", extra={"fields": {"reason": self._missing}})
            return
        wait = self._config.reconnect_wait
        while True:
            began = time.monotonic()
            try:
                await self._session(service, audit)
            except (OSError, TimeoutError, BusError, AgentError, JobError) as error:
                self._lost(error)
            except Exception as error:  # a task root: whatever it is, jobs go on
                log.exception("the projection on the bus failed")
                self._lost(error)
            if time.monotonic() - began > self._config.reconnect_wait_max:
                wait = self._config.reconnect_wait
            await asyncio.sleep(wait)
            wait = min(wait * 2, self._config.reconnect_wait_max)

    def _lost(self, error: Exception) -> None:
        why = str(error) or f"it does not answer for {self._config.call_timeout:g} s (dbus.call_timeout)"
        if absent := isinstance(error, FileNotFoundError):
            why = f"there is no bus at {self._address}"
        if self.state.connected or why != self.state.why:  # once, and not at each attempt
            log.warning("not on the bus", extra={"fields": {"reason": why}})
        self.state = State(why=why, absent=absent)

    async def _session(self, service: Service, audit: Tell) -> None:
        """One connection, from its beginning to its end."""
        assert self._address is not None
        config = self._config
        tree = Tree(config.objects, self._facts)
        settings = follow.Settings(config.refresh, config.finished_time, config.finished_count)
        follower = Follower(service, tree, self._pending, settings)
        shows = _Shows(follower, tree)
        limits = front.Limits(config.calls, config.caller_calls, config.polkit_timeout, self._never())
        answers = front.Front(service, shows, tree, limits, audit)
        wire = await Wire.connect(
            self._address, Limits(config.call_timeout, config.stall_timeout, config.max_message), answers
        )
        tasks: list[asyncio.Task[Any]] = []
        try:
            self._follower = follower
            await follower.read_all()  # what is shown is there before the name is
            await _take_name(wire)
            follower.tell = _teller(wire)
            self.state = State(connected=True, name=wire.name, why="")
            log.info("on the bus", extra={"fields": {"name": interface.NAME, "objects": len(tree)}})
            tasks = [asyncio.create_task(one) for one in (follower.run(), _heartbeat(wire, config), _gone(wire))]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._follower = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await answers.close()
            wire.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL):
                    await wire.closed.wait()
            wire.abort(wire.why)


class _Shows:
    """What verbs see of it (verbs.Shows)."""

    def __init__(self, follower: Follower, tree: Tree) -> None:
        self._follower = follower
        self._tree = tree

    async def show(self, kind: str, id: str, *, uid: int | None = None) -> str:
        await self._follower.show(kind, id, uid=uid)
        return objects.path_of(kind, id)

    async def drop(self, kind: str, id: str) -> None:
        await self._follower.drop(kind, id)

    def where(self, kind: str, id: str) -> str:
        path = objects.path_of(kind, id)
        if (shown := self._tree.find(path)) is None or shown.id != id:
            remedy = "jobs that ended a while ago are listed by `hostagent job list`"
            raise AgentError("not_found", f"no {kind} {id} is shown", field="id", value=id, remedy=remedy)
        return path


def _teller(wire: Wire) -> Callable[[Message], Any]:
    async def tell(message: Message) -> None:
        await wire.room()
        wire.send(message)

    return tell


async def _take_name(wire: Wire) -> None:
    try:
        answer = (await wire.call(to_bus("RequestName", "su", interface.NAME, DO_NOT_QUEUE))).body[0]
    except BusError as error:
        said = f"{error.message} (is units/dbus/org.hostagent1.conf installed?)"
        raise AgentError("denied", said) from error
    if answer != OWNER:
        raise AgentError("conflict", f"somebody else is {interface.NAME} on this bus")


async def _heartbeat(wire: Wire, config: Dbus) -> None:
    """A bus that says nothing is none, although it has taken all that was sent. An answer may be late where thousands
    of calls come before it."""
    while True:
        await asyncio.sleep(config.stall_timeout)
        asked = asyncio.get_running_loop().time()
        try:
            await wire.call(to_bus("GetId"), config.stall_timeout)
        except TimeoutError:
            if wire.heard > asked:
                continue
            raise Closed(f"the bus does not answer for {config.stall_timeout:g} s (dbus.stall_timeout)") from None


async def _gone(wire: Wire) -> None:
    await wire.closed.wait()
    raise Closed(wire.why)
