"""Answers calls: the standard interfaces from what is shown, our verbs by asking the use-cases.

A call is checked against the interface's document by its head alone, then for the caller's identity; what a stranger
has put into its body is not even read. Whatever goes wrong is an error with a name: no traceback, no silence.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Awaitable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostagent import calls
from hostagent.api import dbus
from hostagent.api.audited import Tell
from hostagent.api.peer import NOBODY, Peer, Places
from hostagent.api.projection import interface, polkit, verbs
from hostagent.api.projection.message import NO_REPLY, STANDARD, BusError, Message, text
from hostagent.api.projection.tree import Shown, Tree
from hostagent.api.projection.wire import Closed, Wire, failure, reply
from hostagent.api.usecases import Service
from hostagent.errors import AgentError, bus_name
from jobs.errors import JobError

log = logging.getLogger(__name__)

MACHINE_ID = Path("/etc/machine-id")
MANAGED = "a{oa{sa{sv}}}"
TOO_MANY = (STANDARD + "LimitsExceeded", "too many calls at a time: wait for an answer (dbus.calls, dbus.caller_calls)")


UNKNOWN = 4
"""Times dbus.calls: calls of whom the bus has not said yet who calls."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`calls` at a time of owners, as many of all others, and as many for all objects; `caller_calls` of one caller.
    `never` are uids that polkit is not asked about."""

    calls: int
    caller_calls: int
    polkit_timeout: float
    never: Collection[int] = ()


class Front:
    """The calls of one connection."""

    _wire: Wire

    def __init__(self, service: Service, shows: verbs.Shows, tree: Tree, limits: Limits, audit: Tell) -> None:
        self._service = service
        self._audit = audit
        self._shows = shows
        self._tree = tree
        self._limits = limits
        self._places = Places(limits.calls)
        self._readers: set[asyncio.Task[None]] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._work: set[asyncio.Future[tuple[Any, ...]]] = set()
        self._callers: Counter[str] = Counter()
        self._managing = asyncio.Lock()

    def __call__(self, wire: Wire, call: Message, frame: bytes) -> None:
        """Answer now, or begin to."""
        self._wire = wire
        try:
            shown, name = self._resolve(call)
            if name in interface.OURS or name == interface.OBJECT_MANAGER:
                self._begin(call, frame, shown)
                return
            signature = interface.ALL[name].methods[call.member][1]
            self._answer(call, reply(call, signature, *self._standard(call, frame, shown)))
        except Exception as error:  # noqa: BLE001 - the root of a call: the answer says it
            self._answer(call, self._failure(call, error))

    async def close(self) -> None:
        """What has not been answered is told so."""
        running = self._readers | self._running
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    # What is called

    def _resolve(self, call: Message) -> tuple[Shown | None, str]:
        """The object, None for a path on the way to some, and the interface whose method is meant: a call need not
        name it."""
        shown = self._tree.find(call.path)
        anywhere = call.interface == interface.PEER  # the specification: any path will do
        if shown is None and not anywhere and self._tree.children(call.path) is None:
            raise BusError(STANDARD + "UnknownObject", f"there is no object {call.path}")
        names = interface.interfaces_at(call.path, shown.interface if shown else None)
        if call.interface and call.interface not in names:
            raise BusError(STANDARD + "UnknownInterface", f"{call.path} has no interface {text(call.interface)}")
        for name in [call.interface] if call.interface else names:
            if (found := interface.ALL[name].methods.get(call.member)) is not None:
                if call.signature != found[0]:
                    said = f"{name}.{call.member} takes {found[0]!r}, not {text(call.signature)!r}"
                    raise BusError(STANDARD + "InvalidArgs", said)
                return shown, name
        raise BusError(STANDARD + "UnknownMethod", f"{call.path} has no method {text(call.member)}")

    # The standard interfaces

    def _standard(self, call: Message, frame: bytes, shown: Shown | None) -> tuple[Any, ...]:
        match call.member:
            case "Introspect":
                names = interface.interfaces_at(call.path, shown.interface if shown else None)
                return (interface.introspection(names, self._tree.children(call.path) or ()),)
            case "Get":
                name, member = dbus.decode(frame).body
                values = self._values(shown, name)
                if member not in values:
                    raise BusError(STANDARD + "UnknownProperty", f"{name} has no property {text(member)}")
                return (values[member],)
            case "GetAll":
                return (dict(self._values(shown, dbus.decode(frame).body[0])),)
            case "Set":
                raise BusError(STANDARD + "PropertyReadOnly", "properties are what they are: call a method")
            case "GetMachineId":
                try:
                    return (MACHINE_ID.read_text().strip(),)
                except OSError as error:
                    raise BusError(STANDARD + "Failed", "this host has no machine id") from error
            case _:
                return ()

    def _values(self, shown: Shown | None, name: str) -> Any:
        if name in interface.STANDARD:
            return {}
        if shown is None or name not in ("", shown.interface):
            raise BusError(STANDARD + "UnknownInterface", f"there is no interface {text(name)} here")
        return shown.values

    # Verbs

    def _begin(self, call: Message, frame: bytes, shown: Shown | None) -> None:
        running, most = (self._readers, 1) if shown is None else (self._running, UNKNOWN)
        if len(running) >= most * self._limits.calls or self._callers[call.sender] >= self._limits.caller_calls:
            raise BusError(*TOO_MANY)
        self._callers[call.sender] += 1
        task = asyncio.create_task(self._run(call, frame, shown))
        running.add(task)
        task.add_done_callback(running.discard)
        task.add_done_callback(lambda _: self._ended(call.sender))

    def _ended(self, sender: str) -> None:
        self._callers[sender] -= 1
        if not self._callers[sender]:
            del self._callers[sender]

    async def _run(self, call: Message, frame: bytes, shown: Shown | None) -> None:
        try:
            if shown is None:
                async with self._managing:
                    await self._wire.room()
                    await self._wire.send_large(reply(call, MANAGED, self._tree.managed()))
                return
            self._answer(call, await self._verb(call, frame, shown))
        except Closed:
            return
        except asyncio.CancelledError:
            name = bus_name("cancelled")
            self._answer(call, failure(call, name, "the agent stops, or has lost the bus; what was begun goes on"))
            raise
        except Exception as error:  # noqa: BLE001 - the root of a task: the answer says it
            self._answer(call, self._failure(call, error))

    async def _verb(self, call: Message, frame: bytes, shown: Shown) -> Message:
        verb = verbs.VERBS[shown.interface, call.member]
        if verb.action is None:
            return await self._do(verb, call, frame, shown, NOBODY)
        peer = await polkit.who(self._wire, call.sender)
        if not self._places.take(peer):
            raise BusError(*TOO_MANY)
        try:
            with calls.serving(calls.Call(uuid.uuid4().hex, "dbus", peer.who, f"pid {peer.pid}")):
                await self._require(verb.action, call, shown, peer)
                return await self._do(verb, call, frame, shown, peer)
        finally:
            self._places.leave(peer)

    async def _require(self, action: str, call: Message, shown: Shown, peer: Peer) -> None:
        never, timeout = self._limits.never, self._limits.polkit_timeout
        try:
            await polkit.require(self._wire, call, peer, action, never=never, timeout=timeout)
        except AgentError as error:
            self._audit(f"{shown.interface}.{call.member}", error.code, id=shown.id or None)
            raise

    async def _do(self, verb: verbs.Verb, call: Message, frame: bytes, shown: Shown, peer: Peer) -> Message:
        signature, answer = interface.OURS[shown.interface].methods[call.member]
        arguments = list(dbus.decode(frame).body)
        options = arguments.pop() if signature.endswith("a{sv}") else {}
        options.pop(verbs.IGNORED, None)
        asked = verbs.Call(self._service, self._shows, peer, shown.id, arguments, options)
        return reply(call, answer, *await asyncio.shield(self._work_on(verb.run(asked))))

    def _work_on(self, work: Awaitable[tuple[Any, ...]]) -> asyncio.Future[tuple[Any, ...]]:
        """It goes on when the call is cancelled: what was begun is not left half done because the bus is gone."""
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    # Answers

    def _answer(self, call: Message, message: Message) -> None:
        if call.flags & NO_REPLY:
            return
        try:
            self._wire.send(message)
        except Closed:
            pass
        except Exception as error:  # noqa: BLE001 - an answer that cannot be said is one, too
            self._wire.send(self._failure(call, error))

    def _failure(self, call: Message, error: Exception) -> Message:
        if isinstance(error, BusError):
            return failure(call, error.name, error.message)
        if isinstance(error, dbus.Malformed):
            return failure(call, STANDARD + "InvalidArgs", text(error))
        if isinstance(error, JobError | AgentError):
            said = f"{error.message}; {error.remedy}" if error.remedy else error.message
            where = f"{error.field}: " if error.field and error.field not in error.message else ""
            return failure(call, bus_name(error.code), text(where + said))
        fault = uuid.uuid4().hex
        what = f"{call.interface}.{call.member}"
        log.error("fault %s in %s", fault, text(what), exc_info=error)
        return failure(call, bus_name("internal"), f"the agent has a fault; look for {fault} in its log")
