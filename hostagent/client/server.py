"""The first words with a server: what it can do, how large the image is, and by which way it is reached best."""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from hostagent.client.dial import Dial, dial
from hostagent.client.extents import Extent
from hostagent.client.features import Features
from hostagent.client.options import Options
from hostagent.client.remote import Remote
from hostagent.client.retry import Retries
from hostagent.errors import AgentError
from hostagent.extents import merged

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Server:
    dial: Dial
    features: Features
    options: Options

    def remote(self) -> Remote:
        """Another connection, not made yet."""
        return Remote(self.dial, self.features.etag)

    @property
    def local(self) -> bool:
        """Whether it is reached by a unix socket."""
        return bool(self.dial.addresses[0].socket)


def contact(url: str, options: Options, told: Callable[[str], None]) -> Server:
    """The server of the ticket. It is tried for a moment, as long as it may be starting."""
    retries = Retries(options.patience, limit=options.patience.first_contact, told=told)
    dialled = dial(url, options)
    while True:
        remote = Remote(dialled)
        try:
            remote.connect()
            features = remote.options()
            server = Server(dialled.preferring(remote.address), features, options)
            return _nearer(server, remote) if features.unix_socket and options.local else server
        except AgentError as error:
            retries.wait(error)
        finally:
            remote.close()


def _nearer(server: Server, remote: Remote) -> Server:
    """By the unix socket that it names, where it is on this host and serves this ticket there, too."""
    if not remote.same_host:
        return server
    near = Dial((remote.address.on_socket(server.features.unix_socket),), server.dial.tls, server.dial.patience)
    other = Remote(near)
    try:
        other.connect()
        features = other.options()
    except (AgentError, ValueError):
        return server
    finally:
        other.close()
    if features.etag != server.features.etag:
        return server
    return Server(near, features, server.options)


def ask(
    server: Server,
    question: Callable[[Remote], T],
    tell: Callable[[str], None],
    *,
    stop: threading.Event | None = None,
    watch: Callable[[Remote], object] = lambda _: None,
) -> T:
    """The answer to a question that changes nothing, asked again where the connection breaks. `watch` gets each
    connection, so that it can be ended."""
    retries = Retries(server.options.patience, stop=stop, told=tell)
    while True:
        remote = server.remote()
        watch(remote)
        try:
            remote.connect()
            return question(remote)
        except AgentError as error:
            retries.wait(error)
        finally:
            remote.close()


def size_of(server: Server, remote: Remote, extents: Extents | None) -> int | None:
    """Bytes of the image, as far as the ticket lets it be seen. None where the server does not tell."""
    if server.features.size is not None:
        return server.features.size
    said = [size for size in (extents.size if extents else None, remote.total()) if size is not None]
    return min(said, default=None)


class Extents:
    """What a server says of an image, in few bytes for each: there may be millions."""

    def __init__(self) -> None:
        self._starts = array("Q")
        self._flags = bytearray()
        self.size = 0

    def add(self, one: Extent) -> None:
        self._starts.append(one.start)
        self._flags.append(one.zero | one.hole << 1 | one.dirty << 2)
        self.size = one.start + one.length

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Extent]:
        for at, (start, flags) in enumerate(zip(self._starts, self._flags, strict=True)):
            end = self._starts[at + 1] if at + 1 < len(self._starts) else self.size
            yield Extent(start, end - start, bool(flags & 1), bool(flags & 2), bool(flags & 4))


def read_extents(remote: Remote, server: Server, *, dirty: bool, start: int = 0, length: int | None = None) -> Extents:
    """Those of the whole image, or of a part where the server can tell of parts. AgentError `not_supported` where it
    knows of none, `not_found` where it has no dirty bitmap."""
    if not server.features.extents:
        raise AgentError("not_supported", f"{remote.address} tells no extents", remedy="see whether it is up to date")
    query = f"context={'dirty' if dirty else 'zero'}"
    if server.features.size is not None and (start or length is not None):
        query += f"&start={start}" + (f"&length={length}" if length is not None else "")
    found, position, most = Extents(), -1, server.options.extents_most
    for one in merged(_parsed(remote, query, dirty)):
        if len(found) >= most:
            message = f"the image at {remote.address} has more than {most} extents"
            raise AgentError("too_large", message, remedy="raise --extents-most")
        if one.start not in ((0, start) if position < 0 else (position,)):
            raise _wrong(remote, f"has a gap before byte {one.start}")
        found.add(one)
        position = one.start + one.length
    return found


def _parsed(remote: Remote, query: str, dirty: bool) -> Iterator[Extent]:
    """The extents, out of their JSON as it comes in: the whole text may be gigabytes."""
    for found in _objects(remote, query):
        start, length, zero = found.get("start"), found.get("length"), found.get("zero")
        if not _is_number(start) or not _is_number(length) or not isinstance(zero, bool):
            raise _wrong(remote, "is not one of start, length and zero")
        if length:
            yield Extent(start, length, zero, bool(found.get("hole", False)), dirty and bool(found.get("dirty")))


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


_OBJECT_MOST = 4096  # characters


def _objects(remote: Remote, query: str) -> Iterator[dict[str, Any]]:
    decoder, text, begun, ended = json.JSONDecoder(), "", False, False
    for block in remote.extents(query):
        text = (text + block.decode("ascii", "replace")).lstrip()
        if not begun:
            if not text.startswith("["):
                raise _wrong(remote, "is not a list")
            begun, text = True, text[1:]
        at = 0
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if at < len(text) and text[at] == "]":
                ended = True
                at = len(text)
            close = text.find("}", at)
            if close < 0:
                break
            try:
                found, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                raise _wrong(remote, "is not JSON") from error
            if not isinstance(found, dict):
                raise _wrong(remote, "is not a list of objects")
            yield found
        text = text[at:]
        if len(text) > _OBJECT_MOST:
            raise _wrong(remote, "is not a list of objects")
    if not ended:
        raise _wrong(remote, "does not end")


def _wrong(remote: Remote, how: str) -> AgentError:
    return AgentError("io_error", f"the list of extents that {remote.address} gave {how}")
