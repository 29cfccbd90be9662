"""D-Bus messages to bytes and back: the only module that knows the library, which is dbus-next or its fork dbus-fast.

Nothing but their marshalling is used. Their connections block the loop while they connect and for as long as somebody
keeps sending, end at the first full socket or unknown message, have no bound for what waits to be sent, and answer with
tracebacks: ours is projection/wire.py.
"""

from __future__ import annotations

import io
from typing import Any

from hostagent.api.projection.message import Kind, Message, Variant

library: Any
Unmarshaller: Any
try:
    import dbus_next
    from dbus_next._private import unmarshaller

    library, Unmarshaller = dbus_next, unmarshaller.Unmarshaller
except ImportError:
    try:
        import dbus_fast
        from dbus_fast._private import unmarshaller as fast

        library, Unmarshaller = dbus_fast, fast.Unmarshaller
    except ImportError:
        library = Unmarshaller = None

PACKAGE = "dbus-next"
FIXED = 16
"""Bytes of a message's head that are the same in all messages."""


class Malformed(Exception):
    """Bytes that are no message, or none that the library knows."""


def absent() -> str | None:
    """What is missing for D-Bus; None when all is there."""
    return None if library is not None else f"neither {PACKAGE} nor dbus-fast is installed"


def sizes(head: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Bytes of a message up to its body, and of the body, by its first FIXED bytes."""
    order = {ord("l"): "little", ord("B"): "big"}.get(head[0])
    if order is None:
        raise Malformed(f"a message begins with {head[0]:#x}")
    body, fields = int.from_bytes(head[4:8], order), int.from_bytes(head[12:16], order)  # type: ignore[arg-type]
    return FIXED + fields + -fields % 8, body


def encode(message: Message, serial: int) -> bytes:
    made = library.Message(
        message_type=library.MessageType(int(message.kind)),
        path=message.path or None,
        interface=message.interface or None,
        member=message.member or None,
        error_name=message.error or None,
        reply_serial=message.reply_to or None,
        destination=message.destination or None,
        flags=library.MessageFlag(message.flags),
        signature=message.signature,
        body=_out(message.body),
        serial=serial,
    )
    return bytes(made._marshall(False))


def decode(frame: bytes, *, body: bool = True) -> Message:
    """A whole message; without `body` all but that, which need not be there. Raises Malformed."""
    start, _ = sizes(frame)
    if not body and (len(frame) == start or library.__name__ == "dbus_next"):  # dbus-fast loses the signature by that
        frame = frame[:4] + bytes(4) + frame[8:start]
    try:
        found = Unmarshaller(io.BytesIO(frame)).unmarshall()
        if found is None:
            raise Malformed("a message ends early")
        return Message(
            kind=Kind(found.message_type.value),
            path=found.path or "",
            interface=found.interface or "",
            member=found.member or "",
            signature=found.signature or "",
            body=tuple(_in(value) for value in found.body) if body else (),
            destination=found.destination or "",
            sender=found.sender or "",
            error=found.error_name or "",
            reply_to=found.reply_serial or 0,
            serial=found.serial,
            flags=int(found.flags),
        )
    except Malformed:
        raise
    except Exception as error:  # the library raises whatever it stumbles over
        raise Malformed(f"{type(error).__name__}: {error}") from error


def _out(value: Any) -> Any:
    if isinstance(value, Variant):
        return library.Variant(value.signature, _out(value.value))
    if isinstance(value, list | tuple):
        return [_out(item) for item in value]
    if isinstance(value, dict):
        return {key: _out(item) for key, item in value.items()}
    return value


def _in(value: Any) -> Any:
    if isinstance(value, library.Variant):
        return _in(value.value)
    if isinstance(value, list | tuple):
        return [_in(item) for item in value]
    if isinstance(value, dict):
        return {key: _in(item) for key, item in value.items()}
    return value
