"""A ticket: the right to read or write one image, for a time. Its id is the secret.

The fields are those of ovirt-imageio (its tickets API), judged strictly: what is wrong is named, nothing is guessed.
Unknown ones are passed over, so that newer callers work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hostagent.data.errors import HttpError

OPS = ("read", "write")
_LARGEST = 2**63 - 1
_LONGEST_TIMEOUT = 10 * 365 * 86400
_ID = re.compile(r"[A-Za-z0-9._~:@!$&'()*+,;=-]{1,128}", re.ASCII)
_TEXT = 1024  # characters of a name


@dataclass(frozen=True, slots=True)
class Spec:
    """What a caller asked for. `size` in bytes, times in seconds. `writable` implies that it can be read.

    What ovirt-imageio does not know: `image` is the read-only image behind an NBD export (see backends.mapped); `rate`
    bytes/s, 0 for no limit; `bitmap` the dirty bitmap's name where an export has several. With `dirty_fallback` an
    image without a bitmap is called dirty as a whole, and the answer says so. With `drains` time is only over when
    nothing runs. These two are CloudStack's.
    """

    uuid: str
    size: int
    ops: tuple[str, ...]
    timeout: int
    url: str
    inactivity_timeout: int
    transfer_id: str | None = None
    filename: str | None = None
    sparse: bool = False
    dirty: bool = False
    image: Mapping[str, object] | None = None
    rate: int = 0
    bitmap: str | None = None
    dirty_fallback: bool = False
    drains: bool = False

    @property
    def readable(self) -> bool:
        return bool(self.ops)

    @property
    def writable(self) -> bool:
        return "write" in self.ops

    @property
    def name(self) -> str:
        """For logs and errors, which its id never reaches."""
        return self.transfer_id or "(ticket)"

    def __repr__(self) -> str:
        return f"<ticket of transfer {self.name}, {'/'.join(self.ops)}, {self.size} bytes>"


def parse(body: bytes, ticket_id: str, inactivity_timeout: int, *, depth: int = 8) -> Spec:
    """A ticket of its JSON; HttpError 400 that names what is wrong. `ticket_id` is the URL's."""
    found = read_object(body, "Ticket is not in a json format", depth)
    fields = _Fields(found)
    uuid = fields.text("uuid", most=128)
    if not _ID.fullmatch(uuid):
        raise invalid("uuid", "(hidden)", "letters, digits and -._~ only, 128 at most")
    if ticket_id and uuid != ticket_id:
        raise HttpError(400, "Invalid ticket: the uuid in its body is not the one in the URL")
    ops = found.get("ops", _MISSING)
    if ops is _MISSING:
        raise missing("ops")
    if not isinstance(ops, list) or not all(isinstance(op, str) for op in ops):
        raise invalid("ops", ops, "expecting a <class 'list'> value")
    if unknown := [op for op in ops if op not in OPS]:
        raise invalid("ops", unknown[0], "expecting read or write")
    image = found.get("image")
    if image is not None and not isinstance(image, dict):
        raise invalid("image", image, "expecting an object")
    return Spec(
        uuid=uuid,
        size=fields.number("size"),
        ops=tuple(dict.fromkeys(ops)),
        timeout=fields.number("timeout", most=_LONGEST_TIMEOUT),
        url=fields.text("url", most=4096),
        inactivity_timeout=fields.number("inactivity_timeout", inactivity_timeout, most=_LONGEST_TIMEOUT),
        transfer_id=fields.text("transfer_id", None),
        filename=fields.text("filename", None),
        sparse=fields.truth("sparse"),
        dirty=fields.truth("dirty"),
        image=image,
        rate=fields.number("rate", 0),
        bitmap=fields.text("bitmap", None),
    )


def timeout_of(body: bytes) -> int:
    """Of the JSON that extends a ticket; HttpError 400."""
    found = read_object(body, "Invalid patch: not in a json format", 4)
    return int(_Fields(found).number("timeout", most=_LONGEST_TIMEOUT))


_MISSING: Any = object()


class _Fields:
    def __init__(self, found: Mapping[str, Any]) -> None:
        self._found = found

    def number(self, name: str, default: Any = _MISSING, *, most: int = _LARGEST) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise invalid(name, value, "expecting a <class 'int'> value")
        if not 0 <= value <= most:
            raise invalid(name, value, f"expecting 0 to {most}")
        return value

    def text(self, name: str, default: Any = _MISSING, *, most: int = _TEXT) -> Any:
        value = self._get(name, default)
        if value is None and default is None:
            return None
        if not isinstance(value, str):
            raise invalid(name, value, "expecting a <class 'str'> value")
        if len(value) > most or (not value and default is _MISSING):
            raise invalid(name, value, f"expecting 1 to {most} characters")
        return value

    def truth(self, name: str) -> bool:
        value = self._get(name, False)
        if not isinstance(value, bool):
            raise invalid(name, value, "expecting a <class 'bool'> value")
        return value

    def _get(self, name: str, default: Any) -> Any:
        value = self._found.get(name, default)
        if value is _MISSING:
            raise missing(name)
        return value


def read_object(body: bytes, what: str, depth: int) -> dict[str, Any]:
    """A JSON object, nested no deeper than `depth`; HttpError 400."""
    try:
        text = body.decode("utf-8")
        if _depth(text) > depth:
            raise HttpError(400, f"{what}: it nests deeper than {depth}")
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"{what}: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise HttpError(400, f"{what}: expecting an object")
    return found


def _depth(text: str) -> int:
    """Brackets in strings count, too: it may be too much, never too little."""
    deepest = now = 0
    for character in text:
        if character in "[{":
            now += 1
            deepest = max(deepest, now)
        elif character in "]}":
            now -= 1
    return deepest


def missing(name: str) -> HttpError:
    return HttpError(400, f"Invalid ticket: Required ticket parameter is missing: {name}")


def invalid(name: str, value: object, why: str) -> HttpError:
    return HttpError(400, f"Invalid ticket: Invalid value for {name!r}: {str(value)[:100]!r}: {why}")
