"""Who calls, and whether they may: the bus says who, polkit whether.

root and the agent's own user may do what they want, as on the agent's socket; anybody else what polkit lets them
(org.freedesktop.PolicyKit1.Authority.CheckAuthorization). Where it is absent, hangs, or says anything but yes, they may
not.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from hostagent.api.peer import NOBODY, Peer
from hostagent.api.projection.message import INTERACTIVE, NO_REPLY, BusError, Kind, Message, Variant, to_bus
from hostagent.api.projection.wire import Closed, Wire
from hostagent.errors import AgentError

log = logging.getLogger(__name__)

ACTIONS = {verb: f"org.hostagent1.{verb}" for verb in ("job-start", "job-control", "export", "grant-revoke")}
POLKIT = "org.freedesktop.PolicyKit1"
ASK = 1
"""AllowUserInteraction: polkit may ask the caller for a password."""


async def who(wire: Wire, sender: str) -> Peer:
    """The caller, as the bus knows it from its socket. Raises AgentError denied."""
    try:
        found = (await wire.call(to_bus("GetConnectionCredentials", "s", sender))).body[0]
        return Peer(
            pid=found.get("ProcessID", 0),
            uid=found["UnixUserID"],
            gid=NOBODY.gid,
            groups=tuple(found.get("UnixGroupIDs", ())),
        )
    except (BusError, Closed, TimeoutError, KeyError, IndexError) as error:
        raise AgentError(
            "denied", "the bus does not say who calls", remedy="stay connected until it is done"
        ) from error


async def require(
    wire: Wire, call: Message, peer: Peer, action: str, *, never: Collection[int], timeout: float
) -> None:
    """Raises AgentError denied. `never`: users that may not, whatever polkit says."""
    if peer.owner:
        return
    try:
        await _ask(wire, call, peer, action, never, timeout)
    except AgentError as error:
        fields = {"uid": peer.uid, "pid": peer.pid, "action": ACTIONS[action], "reason": error.message}
        log.warning("refused a call on the bus", extra={"fields": fields})
        raise


async def _ask(wire: Wire, call: Message, peer: Peer, action: str, never: Collection[int], timeout: float) -> None:
    if peer.uid in never:
        raise AgentError("denied", f"uid {peer.uid} may not use this agent", remedy="ask as another user")
    cancellation = uuid.uuid4().hex
    subject = ["system-bus-name", {"name": Variant("s", call.sender)}]
    flags = ASK if call.flags & INTERACTIVE else 0
    question = _to_polkit("CheckAuthorization", "(sa{sv})sa{ss}us", subject, ACTIONS[action], {}, flags, cancellation)
    try:
        allowed, challenge, _ = (await wire.call(question, timeout)).body[0]
    except TimeoutError:
        wire.send(replace(_to_polkit("CancelCheckAuthorization", "s", cancellation), flags=NO_REPLY))
        raise AgentError(
            "denied",
            f"polkit has not answered for {timeout:g} s (dbus.polkit_timeout)",
            remedy="see whether polkit runs, or ask as root",
        ) from None
    except (BusError, Closed, IndexError, ValueError, TypeError) as error:
        raise AgentError(
            "denied", "polkit cannot be asked", remedy="see whether polkit runs, or ask as root"
        ) from error
    if allowed is not True:
        remedy = "call again and let polkit ask for a password" if challenge and not flags else "ask an administrator"
        raise AgentError("denied", f"uid {peer.uid} lacks the authorisation {ACTIONS[action]}", remedy=remedy)


def _to_polkit(member: str, signature: str, *body: Any) -> Message:
    path = "/org/freedesktop/PolicyKit1/Authority"
    return Message(Kind.CALL, path, f"{POLKIT}.Authority", member, signature, body, destination=POLKIT)
