"""The data daemon as the agent's child: started, watched, started again, and left alone where it works.

It outlives the agent, as storage daemons do: who downloads notices nothing of the agent's restart. The next agent finds
it by its control socket, and goes on with it; where its version or settings are others than those in force, until
nobody has a ticket of it. One that ended is started again, ever more slowly; with it end its tickets, which is what its
clients and whoever gave these are told by it.

The agent binds its sockets: they lie where the daemon's user may make no file.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hostagent.errors import AgentError
from hostagent.transfers.control import Control

log = logging.getLogger(__name__)

STEADY = 30.0
"""Seconds of life after which an end is no reason to be slow with the next start."""

SILENT = "it does not answer any more"

Launch = Callable[[list[str], list[int]], subprocess.Popen[bytes]]
"""Starts a command as the daemon's user; these descriptors keep their numbers."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`command` is the daemon's, `mark` tells its version and settings from others; `ready` seconds until it must
    answer, `look` between two looks at it, `retry` and `retry_max` before it is started again."""

    command: list[str]
    mark: str
    ready: float
    look: float
    retry: float = 1.0
    retry_max: float = 60.0


class Child:
    """`listen` makes its sockets, by name. `tell` hears when its state changes."""

    def __init__(
        self,
        control: Control,
        settings: Settings,
        *,
        listen: Callable[[], dict[str, socket.socket]],
        launch: Launch,
        tell: Callable[[bool, str | None], None],
    ) -> None:
        self.control = control
        self._settings = settings
        self._listen = listen
        self._launch = launch
        self._tell = tell
        self._process: subprocess.Popen[bytes] | None = None
        self.pid: int | None = None
        self.starting = True
        """For the first time: nothing is wrong yet."""
        self.error: str | None = "it is being started"
        self.outdated = False
        """It began with another version, or other settings, than those in force."""

    async def run(self) -> None:
        """Until it is cancelled: that leaves the daemon as it is (see `stop`)."""
        retry, now = self._settings.retry, asyncio.get_running_loop().time
        while True:
            began = now()
            try:
                if not await self._answers():
                    await self._start()
                self._failed(await self._until_it_ends())
                if self.outdated:
                    continue
            except (AgentError, OSError) as error:
                self._failed(str(error))
            if now() - began > STEADY:
                retry = self._settings.retry
                continue
            await asyncio.sleep(retry)
            retry = min(retry * 2, self._settings.retry_max)

    async def stop(self) -> None:
        """End it, unless a ticket is in use: then it goes on, and the next agent finds it."""
        try:
            found = await asyncio.to_thread(self.control.health)
        except AgentError:
            return
        if found.get("tickets") == 0 and isinstance(pid := found.get("pid"), int) and pid == self.pid:
            await asyncio.to_thread(self._end, pid)

    def _end(self, pid: int) -> None:
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            return
        try:
            signal.pidfd_send_signal(handle, signal.SIGTERM)
            if not select.select([handle], [], [], self._settings.ready)[0]:
                log.warning("the data daemon takes its time to end", extra={"fields": {"pid": pid}})
        except OSError:
            pass
        finally:
            os.close(handle)
        if self._process is not None:
            self._process.poll()

    async def _answers(self) -> bool:
        """Whether it does, and may go on: one that is outdated ends as soon as nobody has a ticket."""
        try:
            found = await asyncio.to_thread(self.control.health)
        except AgentError:
            return False
        self.pid = found.get("pid")
        self.outdated = found.get("mark") != self._settings.mark
        if self.outdated and found.get("tickets") == 0 and isinstance(self.pid, int):
            log.info("a data daemon of another version, or other settings, ends", extra={"fields": {"pid": self.pid}})
            await asyncio.to_thread(self._end, self.pid)
            return False
        if self.error is not None:
            self.error, self.starting = None, False
            self._tell(True, None)
            log.info("data daemon answers", extra={"fields": {"pid": self.pid}})
        return True

    async def _until_it_ends(self) -> str:
        """Or does not answer any more; which of the two."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        handle = -1
        try:
            if self.pid is not None:
                handle = os.pidfd_open(self.pid)
                loop.add_reader(handle, ended.set)
            while not ended.is_set():
                try:
                    await asyncio.wait_for(ended.wait(), self._settings.look)
                except TimeoutError:
                    if not await self._answers():
                        return "it begins anew, with the settings in force" if self.outdated else SILENT
        except OSError:
            pass  # it ended in this moment
        finally:
            if handle >= 0:
                loop.remove_reader(handle)
                os.close(handle)
            if self._process is not None:
                self._process.poll()
        return "it ended, and its tickets with it; the log says why"

    async def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            raise AgentError("unresponsive", f"the data daemon (pid {self.pid}) runs, and does not answer")
        listeners = await asyncio.to_thread(self._listen)
        try:
            inherit = [f"--inherit={name}={one.fileno()}" for name, one in listeners.items()]
            fds = [one.fileno() for one in listeners.values()]
            command = [*self._settings.command, f"--mark={self._settings.mark}", *inherit]
            self._process = await asyncio.to_thread(self._launch, command, fds)
        finally:
            for listener in listeners.values():
                listener.close()
        self.pid = self._process.pid
        deadline = asyncio.get_running_loop().time() + self._settings.ready
        while not await self._answers():
            if self._process.poll() is not None:
                raise AgentError("unavailable", "it ended at once; the log says why")
            if asyncio.get_running_loop().time() > deadline:
                raise AgentError("unresponsive", "it does not answer; see the log")
            await asyncio.sleep(0.05)

    def _failed(self, why: str) -> None:
        changed = self.error != why
        self.error, self.starting = why, False
        if changed:
            self._tell(False, why)
            log.warning("no data daemon", extra={"fields": {"error": why}})

    def facts(self) -> dict[str, Any]:
        """For `status`."""
        return {
            "running": self.error is None,
            "starting": self.starting,
            "pid": self.pid,
            "error": self.error,
            "outdated": self.outdated,
        }
