"""One monitor connection to a QEMU or storage daemon, with a bound on every wait.

qemu.qmp speaks the protocol; what this adds: named timeouts (it has none), one event callback instead of listeners
that keep their history for ever, one kind of error, and a guard: `query-named-block-nodes` crashes QEMU before 10.2
while a stream job is concluded (gitlab.com/qemu-project/qemu/-/issues/3149), so it is refused here for everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError, Runstate

from jobs.errors import JobError

log = logging.getLogger(__name__)

CRASHES_QEMU = frozenset({"query-named-block-nodes"})


class Refused(JobError):
    """The monitor answered with an error: it is there, and it said no. `code` is what JobError takes."""

    def __init__(self, command: str, text: str) -> None:
        super().__init__("job_failed", text, command=command)
        self.text = text


class _Callback(EventListener):
    """A listener that keeps nothing."""

    def __init__(self, call: Callable[[str, Mapping[str, Any]], None]) -> None:
        super().__init__()
        self._call = call

    async def put(self, event: Message) -> None:
        data = event.get("data", {})
        self._call(str(event["event"]), data if isinstance(data, Mapping) else {})


class Monitor:
    """A connection. `on_event(name, data)` is called on the event loop; `on_close()` once, when the peer is gone."""

    def __init__(
        self,
        name: str,
        *,
        connect_timeout: float,
        call_timeout: float,
        on_event: Callable[[str, Mapping[str, Any]], None],
        on_close: Callable[[], None],
    ) -> None:
        self._name = name
        self._connect_timeout = connect_timeout
        self._call_timeout = call_timeout
        self._on_close = on_close
        self._client = QMPClient(name)
        default, self._client.events = self._client.events, _Callback(on_event)
        self._client.remove_listener(default)
        self._client.register_listener(self._client.events)
        self._watch: asyncio.Task[None] | None = None
        self._disconnecting: asyncio.Future[None] | None = None

    async def connect(self, path: str, connected: socket.socket | None = None) -> None:
        """Raises JobError unresponsive when there is no greeting in time (another client may have the monitor).

        `connected` is taken over, and used instead of connecting to `path`.
        """
        try:
            await asyncio.wait_for(self._client.connect(connected or path), self._connect_timeout)
        except (TimeoutError, QMPError, OSError, AssertionError) as error:
            # The library asserts in the end that the session stands, which it does not when the daemon died after its
            # greeting.
            await self._disconnect()
            what = f"no answer within {self._connect_timeout:g} s" if isinstance(error, TimeoutError) else str(error)
            what = what or "it was closed"
            raise JobError(
                "unresponsive",
                f"the monitor {path!r} cannot be used: {what}",
                remedy="see whether another program is connected to it, or the daemon is stopped",
            ) from error
        self._watch = asyncio.create_task(self._until_closed(), name=f"monitor {self._name}")

    @property
    def connected(self) -> bool:
        return self._client.runstate is Runstate.RUNNING

    async def execute(self, command: str, timeout: float | None = None, **arguments: Any) -> Any:
        """The command's return value. `Refused` when the monitor says no, JobError unresponsive when it says nothing.

        Argument names with dashes are written with underscores (node_name → node-name). After unresponsive the outcome
        of the command is not known.
        """
        if command in CRASHES_QEMU:
            raise ValueError(f"{command} can crash QEMU while a stream job is concluded")
        limit = self._call_timeout if timeout is None else timeout
        sent = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            return await asyncio.wait_for(self._client.execute(command, sent or None), limit)
        except ExecuteError as error:
            raise Refused(command, str(error)) from error
        except TimeoutError as error:
            raise JobError(
                "unresponsive",
                f"{self._name} did not answer {command} within {limit:g} s (qmp.call_timeout)",
                remedy="see `hostagent status`; it is not killed, since it may hold data",
            ) from error
        except (QMPError, OSError, EOFError) as error:
            raise JobError("unresponsive", f"the connection to {self._name} broke: {error}") from error

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        await self._disconnect()

    async def _until_closed(self) -> None:
        # runstate_changed() may be missed when it is set and cleared at once: look at the state itself, too.
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        await self._disconnect()
        self._on_close()

    async def _disconnect(self) -> None:
        """Once, whoever asks first, and never cancelled: qemu.qmp's disconnect() is not made to run twice at a time."""
        if self._disconnecting is None:
            self._disconnecting = asyncio.ensure_future(self._client.disconnect())
            self._disconnecting.add_done_callback(lambda task: task.cancelled() or task.exception())
        # It raises what ended the connection, also after a clean `quit`.
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._disconnecting), self._connect_timeout)
