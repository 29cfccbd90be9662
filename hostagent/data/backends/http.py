"""Images of other data daemons (`http:`, `https:`): the proxy role, for clients that cannot reach the host itself.

Bytes are passed on as they come; nothing is kept here but a piece. What the other daemon can do is asked once. What was
written over a connection that broke before a flush may be lost with whatever is behind it, and no later flush pretends
otherwise.
"""

from __future__ import annotations

import functools
import json
import ssl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from hostagent.data.backends.base import (
    BackendSession,
    DirtyExtent,
    Extent,
    ImageBackend,
    beyond,
)
from hostagent.data.backends.file import read_only
from hostagent.data.backends.lists import READ, objects
from hostagent.data.backends.origin import Answer, Fence, Origin, Place, ProxyWaits
from hostagent.data.backends.registry import Factory, Opening
from hostagent.data.backends.whole import Body
from hostagent.data.streams import PIECE, PeerGone, Sink, Source
from hostagent.errors import AgentError
from hostagent.extents import clipped, merged

PORTS = {"http": 80, "https": 443}
_FLUSHING = {False: "?flush=n", True: "?flush=y"}


def daemons(allowed: Sequence[str], authorities: Path | None, waits: ProxyWaits) -> Factory:
    """For `http:` and `https:` URLs; `allowed` is data.proxy, `authorities` data.proxy_ca."""

    @functools.cache
    def tls() -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=None if authorities is None else str(authorities))
        except (OSError, ssl.SSLError) as error:
            message = f"{str(authorities)!r} has no certificates that can be read"
            raise AgentError("unavailable", message, remedy="correct data.proxy_ca") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    def open_(opening: Opening) -> ImageBackend:
        return HttpBackend(opening, place_of(opening.url, allowed, tls), waits)

    return open_


def place_of(url: str, allowed: Sequence[str], tls: Callable[[], ssl.SSLContext]) -> Place:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port or PORTS[parts.scheme]
    except (ValueError, LookupError):
        raise _no_image() from None
    folder, _, ticket = parts.path.rpartition("/")
    if not host or parts.username or parts.query or parts.fragment or folder != "/images" or not ticket:
        raise _no_image()
    shown = f"[{host}]" if ":" in host else host
    if not {shown, f"{shown}:{port}"} & {one.lower() for one in allowed}:
        message = f"{shown}:{port} is none of the daemons that this one may ask"
        remedy = f"add {shown}:{port} to data.proxy, if it is another data daemon of yours"
        raise AgentError("denied", message, field="url", remedy=remedy)
    return Place(host, port, parts.path, tls() if parts.scheme == "https" else None)


def _no_image() -> AgentError:
    remedy = "https://HOST:PORT/images/TICKET"
    return AgentError("invalid", "the URL names no image of another data daemon", field="url", remedy=remedy)


@dataclass(frozen=True, slots=True)
class Can:
    """What OPTIONS says. Daemons that do not know it can read and write, one at a time."""

    features: frozenset[str] = frozenset()
    writes: bool = True
    readers: int = 1
    writers: int = 1
    size: int | None = None
    block_size: int = 1


class HttpBackend(ImageBackend):
    kind = "http"

    def __init__(self, opening: Opening, place: Place, waits: ProxyWaits) -> None:
        self._opening = opening
        self._fence = Fence()
        self._place = place
        self._waits = waits
        self.origin = Origin(place, waits, self._fence)
        self._can: Can | None = None
        self._size: int | None = None
        self._wrote_over: int | None = None  # the connection of what was not flushed
        self._lost = False

    # What it is

    @property
    def supports_extents(self) -> bool:
        return "extents" in self.can().features

    @property
    def supports_range_write(self) -> bool:
        return True

    @property
    def block_size(self) -> int:
        return self.can().block_size

    @property
    def max_readers(self) -> int:
        return self.can().readers

    @property
    def max_writers(self) -> int:
        return max(1, self.can().writers)

    @property
    def flush_covers_all(self) -> bool:
        """No: that host may have lost its power and be back, which a connection that is idle does not tell."""
        return False

    def get_capabilities(self) -> dict[str, bool]:
        can = self.can()
        writes = self._opening.writable and can.writes
        return {"read_only": not writes, "can_flush": writes and "flush" in can.features, "can_zero": writes}

    def size(self) -> int:
        self._fence.check()
        if self._size is None:
            self._size = self.can().size
        if self._size is None:
            self._size = self._length()
        return self._size

    def can(self) -> Can:
        self._fence.check()
        if self._can is None:
            try:
                answer = self.origin.ask("OPTIONS")
                found = answer.json() if answer.length != 0 else {}
            except AgentError as error:
                if error.details.get("status") != 405:
                    raise
                answer, found = None, {}
            self._can = _understood(found, answer)
        return self._can

    # Bytes

    def read(self, offset: int, length: int) -> bytes:
        with self.open_session() as session:
            return session.read(offset, length)

    def open_session(self) -> BackendSession:
        self._fence.check()
        return _Session(self)

    def get(self, offset: int, length: int) -> Answer:
        """The answer with exactly these bytes."""
        answer = self.origin.ask("GET", headers={"Range": f"bytes={offset}-{offset + length - 1}"})
        said = answer.header("content-range")
        right = answer.status == 206 and said.startswith(f"bytes {offset}-{offset + length - 1}/")
        if (not right and (answer.status, offset) != (200, 0)) or answer.length != length:
            raise self.origin.wrong(f"it gives {answer.length} bytes with status {answer.status} for {length} asked")
        return answer

    def write(self, data: bytes, offset: int) -> None:
        self._refuse_write(offset, len(data))
        if data:
            self._put(memoryview(data), offset)

    def write_from(self, source: Source, offset: int, length: int | None) -> int:
        """In requests of one piece: few daemons take a body of unknown length, and one that is refused, or broken off,
        costs no more than that."""
        self._refuse_write(offset, length or 0)
        buffer, done = memoryview(bytearray(PIECE)), 0
        while length is None or done < length:
            wanted = PIECE if length is None else min(PIECE, length - done)
            number = source.read_into(buffer[:wanted])
            if offset + done + number > self.size():
                raise beyond(self.size())
            if number:
                self._put(buffer[:number], offset + done)
            done += number
            if number < wanted:
                break
        return _all(done, length)

    def write_full(self, stream: BinaryIO, content_length: int, flush: bool) -> int:
        """In one request, sent as it comes; a stream that ends early leaves it unfinished."""
        self._refuse_write(0, content_length)
        source, buffer, done = Body(stream), memoryview(bytearray(PIECE)), 0
        try:
            self.origin.begin("PUT", _FLUSHING[flush], {"Content-Length": str(content_length)})
            while done < content_length and (number := source.read_into(buffer[: content_length - done])):
                self.origin.send(buffer[:number])
                done += number
            _all(done, content_length)
        except BaseException:
            self.origin.close()
            raise
        self.origin.answer().text()
        self._wrote_over = None if flush else self.origin.number
        return done

    def zero(self, offset: int, length: int) -> None:
        self._refuse_write(offset, length)
        if "zero" in self.can().features:
            self._patch({"op": "zero", "offset": offset, "size": length, "flush": False})
            self._wrote()
            return
        zeros, end = memoryview(bytes(PIECE)), offset + length
        while offset < end:
            self._put(zeros[: end - offset], offset)
            offset += min(PIECE, end - offset)

    def flush(self) -> None:
        if not self._opening.writable:
            raise read_only()
        self._fence.check()
        if "flush" not in self.can().features:
            raise AgentError("not_supported", f"{self._place} cannot flush", remedy="upload with flush=y")
        self._refuse_lost()
        self._patch({"op": "flush"})
        if self._wrote_over is not None:
            self._wrote()
            self._refuse_lost()
        self._wrote_over = None

    # Extents

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        found = self._listed("zero", start, length)
        return clipped((Extent(at, size, zero, hole) for at, size, zero, hole, _ in found), start, start + length)

    def dirty_extents(self, start: int, length: int) -> Iterator[DirtyExtent]:
        found = self._listed("dirty", start, length)
        return clipped(
            (DirtyExtent(at, size, dirty, zero) for at, size, zero, _, dirty in found), start, start + length
        )

    def get_allocation_extents(self) -> list[dict[str, Any]]:
        return [one._asdict() for one in merged(self.extents(0, self.size()))]

    def get_dirty_extents(self, dirty_bitmap_context: str) -> list[dict[str, Any]]:
        return [one._asdict() for one in merged(self.dirty_extents(0, self.size()))]

    # Lifetime

    def close(self) -> None:
        self.origin.close()

    def fence(self) -> None:
        self._fence.close()

    # Parts

    def _length(self) -> int:
        """Of a daemon that says it nowhere but in a download, which goes no further than its head."""
        try:
            answer = self.origin.ask("GET")
            if answer.length is None:
                raise self.origin.wrong("it does not say how long the image is")
            return answer.length
        finally:
            self.origin.close()

    def _refuse_write(self, offset: int, length: int) -> None:
        if not self._opening.writable or not self.can().writes:
            raise read_only()
        if offset + length > self.size():
            raise beyond(self.size())
        self._refuse_lost()

    def _wrote(self) -> None:
        """Over the present connection. Whatever an earlier one wrote, and did not flush, is not sure to be flushed."""
        number = self.origin.number
        self._lost |= self._wrote_over not in (None, number)
        self._wrote_over = number

    def _refuse_lost(self) -> None:
        if self._lost:
            message = f"the connection to {self._place} ended with writes that were not flushed, which may be lost"
            raise AgentError("io_error", message, remedy="write them again, over a new connection")

    def _put(self, data: memoryview, offset: int) -> None:
        head = {"Content-Range": f"bytes {offset}-{offset + len(data) - 1}/*"}
        self.origin.ask("PUT", below=_FLUSHING[False], headers=head, body=data).text()
        self._wrote()

    def _patch(self, what: dict[str, Any]) -> None:
        body = json.dumps(what).encode()
        self.origin.ask("PATCH", headers={"Content-Type": "application/json"}, body=body).text()

    def _listed(self, context: str, start: int, length: int) -> Iterator[tuple[int, int, bool, bool, bool]]:
        """Start, length, zero, hole, dirty. Of the part, where the other daemon knows of parts, else of all: the list
        comes over a connection of its own, for it may be read slowly."""
        if start + length > self.size():
            raise beyond(self.size())
        if not self.supports_extents:
            raise AgentError("not_supported", f"{self._place} tells no extents", remedy="see whether it is up to date")
        if not length:
            return iter(())
        origin = Origin(self._place, self._waits, self._fence)
        query = f"/extents?context={context}&start={start}&length={length}"
        try:
            answer = origin.ask("GET", below=query)
        except BaseException:
            origin.close()
            raise
        return _entries(answer, origin, start, start + length)


class _Session(BackendSession):
    """The backend's own connection, which serves one operation after the other."""

    def __init__(self, backend: HttpBackend) -> None:
        self._backend = backend

    def size(self) -> int:
        return self._backend.size()

    def read(self, offset: int, length: int) -> bytes:
        found = bytearray(length)
        at = 0
        for piece in self._pieces(offset, length):
            found[at : at + len(piece)] = piece
            at += len(piece)
        return bytes(found)

    def copy_to(self, sink: Sink, offset: int, length: int) -> None:
        for piece in self._pieces(offset, length):
            sink.write(piece)

    def close(self) -> None:
        """The connection is the backend's."""

    def _pieces(self, offset: int, length: int) -> Iterator[memoryview]:
        if offset + length > self.size():
            raise beyond(self.size())
        if not length:
            return
        answer, done = self._backend.get(offset, length), 0
        buffer = memoryview(bytearray(min(PIECE, length)))
        try:
            while done < length:
                piece = buffer[: length - done]
                answer.read_into(piece)
                yield piece
                done += len(piece)
        finally:
            if done < length:  # what is left of the answer would be taken for the next one
                self._backend.origin.close()


def _understood(found: dict[str, Any], answer: Answer | None) -> Can:
    if answer is None:
        return Can()
    features, size = found.get("features"), found.get("size")
    allow = {one.strip() for one in answer.header("allow").split(",")}
    return Can(
        frozenset(one for one in features if isinstance(one, str)) if isinstance(features, list) else frozenset(),
        "PUT" in allow if allow != {""} else True,
        _number(found, "max_readers", 1),
        _number(found, "max_writers", 1),
        size if isinstance(size, int) and not isinstance(size, bool) and size >= 0 else None,
        max(1, _number(found, "block_size", 1)),
    )


def _all(done: int, length: int | None) -> int:
    if length is not None and done < length:
        raise PeerGone(f"the body ended after {done} of {length} bytes")
    return done


def _number(found: dict[str, Any], name: str, default: int) -> int:
    value = found.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1 << 20 else default


def _entries(answer: Answer, origin: Origin, start: int, end: int) -> Iterator[tuple[int, int, bool, bool, bool]]:
    """As far as they are wanted; AgentError where they have gaps, or end before."""
    position: int | None = None
    try:
        for one in objects(answer.blocks(READ)):
            at, size, zero = one.get("start"), one.get("length"), one.get("zero")
            numbers = type(at) is int and type(size) is int and size > 0
            if not numbers or not isinstance(zero, bool) or at != (position if position is not None else at):
                raise ValueError(f"it has a gap at byte {position}")
            assert isinstance(at, int)
            assert isinstance(size, int)
            if position is None and not 0 <= at <= start:
                raise ValueError(f"it begins at byte {at}")
            position = at + size
            if position > start:
                yield at, size, zero, bool(one.get("hole", False)), bool(one.get("dirty", False))
            if position >= end:
                return
        if (position or 0) < end:
            raise ValueError(f"it ends at byte {position or 0}")
    except ValueError as error:
        raise origin.wrong(f"its list of extents: {error}") from error
    finally:
        origin.close()
