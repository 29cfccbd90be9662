"""What of a transfer is durable, in a file beside the local image: a transfer that was cut off goes on from there.

The file is one JSON line that says which transfer it is, and then a line for what became durable each time. It is only
appended to, and each line is on stable storage before the next thing happens; a line that a crash cut off counts for
nothing. The ticket's id is not in it: it is told by a salted digest, which no one turns back.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostagent.client.options import Resume
from hostagent.client.progress import Tell
from hostagent.errors import AgentError
from hostagent.rangeset import RangeSet

VERSION = 1
MOST = 16 << 20
"""Bytes of a journal; one that grows larger is written anew."""
_KIND = "hostagent-resume"


@dataclass(frozen=True, slots=True)
class Identity:
    """Which transfer it is. `local` is the local file's, `how` what changes which bytes go where; `etag` is the
    server's word for the image, "" where it has none; `ticket` the secret."""

    direction: str
    local: Any
    size: int
    how: dict[str, Any]
    etag: str
    ticket: str

    def head(self) -> dict[str, Any]:
        salt = secrets.token_hex(16)
        return {
            _KIND: VERSION,
            "direction": self.direction,
            "local": self.local,
            "size": self.size,
            "how": self.how,
            "etag": self.etag,
            "salt": salt,
            "ticket": _digest(self.ticket, salt),
        }


def misfit(head: dict[str, Any], now: Identity, resume: Resume) -> str | None:
    """Why the journal is not of this transfer; None when it is."""
    if resume == "never":
        return "it was said not to be resumed"
    if head.get("direction") != now.direction or head.get("how") != now.how:
        return "it is of a transfer with other options"
    if head.get("local") != now.local:
        return "the local file has changed since"
    if head.get("size") != now.size:
        return "the image had another size"
    if resume == "trust":
        return None
    if head.get("etag") or now.etag:
        same = head.get("etag") == now.etag
        return None if same else "the server says that it is another image now (ETag)"
    if not hmac.compare_digest(str(head.get("ticket")), _digest(now.ticket, str(head.get("salt")))):
        return "it is of another ticket, and the server does not say whether it is the same image"
    return None


class Journal:
    """Open, and ours alone. `head` is what an earlier transfer left, None if there is none; `durable` its bytes."""

    def __init__(self, path: Path, fd: int, tell: Tell) -> None:
        self.path = path
        self._fd = fd
        self._tell = tell
        self._broken = False
        self._size = 0
        self.head: dict[str, Any] | None = None
        self.durable = RangeSet()
        self._begun: dict[str, Any] = {}
        self._read()

    @classmethod
    def open(cls, path: Path, tell: Tell) -> Journal:
        """AgentError busy when another transfer has it, `conflict` when the file is somebody else's."""
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():  # another could say what is durable
                    raise _foreign(path)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_nlink:
                    return cls(path, fd, tell)
                os.close(fd)  # the transfer that had it is just done
            except BlockingIOError as error:
                os.close(fd)
                message = f"another transfer of this file is under way: it has {path}"
                raise AgentError("busy", message, remedy="wait for it, or name another file") from error
            except BaseException:
                os.close(fd)
                raise

    def begin(self, identity: Identity, durable: RangeSet) -> None:
        """This transfer's from now on; `durable` is what it takes over."""
        self._begun = identity.head()
        self.durable = durable
        self._rewrite()
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def record(self, ranges: Iterable[tuple[int, int]]) -> None:
        """These are durable, too. Where that cannot be written, nothing more is: a kill then costs more."""
        if self._broken:
            return
        try:
            self._append(ranges)
        except OSError as error:
            self._broken = True
            self._tell(f"the journal {self.path} cannot be written any more: {error.strerror}")

    def _append(self, ranges: Iterable[tuple[int, int]]) -> None:
        fresh = RangeSet()
        for begin, end in ranges:
            fresh.add(begin, end)
        self.durable.update(fresh)
        line = json.dumps({"durable": fresh.pairs()}).encode() + b"\n"
        if self._size + len(line) > MOST:
            self._rewrite()
            return
        self._size += os.pwrite(self._fd, line, self._size)
        os.fdatasync(self._fd)

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _rewrite(self) -> None:
        """Cut first: what a crash leaves then is no journal, and not half of one."""
        os.ftruncate(self._fd, 0)
        text = json.dumps(self._begun) + "\n" + json.dumps({"durable": self.durable.pairs()}) + "\n"
        self._size = os.pwrite(self._fd, text.encode(), 0)
        os.fsync(self._fd)

    def _read(self) -> None:
        lines = os.pread(self._fd, MOST + 1, 0).split(b"\n")[:-1]
        if not lines and not os.fstat(self._fd).st_size:
            return
        head = _object(lines[0]) if lines else None
        if head is None or head.get(_KIND) != VERSION:
            raise _foreign(self.path)
        self.head = head
        for line in lines[1:]:
            found = _object(line)
            ranges = found.get("durable") if found else None
            if not isinstance(ranges, list) or not all(map(_is_range, ranges)):
                break
            for begin, end in ranges:
                self.durable.add(begin, end)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_range(found: object) -> bool:
    return (
        isinstance(found, list)
        and len(found) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) for n in found)
        and 0 <= found[0] < found[1]
    )


def _digest(ticket: str, salt: str) -> str:
    return hashlib.pbkdf2_hmac("sha256", ticket.encode(), salt.encode(), 10_000).hex()


def _foreign(path: Path) -> AgentError:
    remedy = "move it away, or name another one with --journal"
    return AgentError("conflict", f"{path} is no journal of hostagent's", remedy=remedy)
