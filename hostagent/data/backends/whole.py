"""A whole new file in the place of another, or of none: there at once and durable, or not at all.

It is written under a name of its own in the same folder, with the owner, mode and access list of the one that it
replaces, and then renamed. A daemon that is killed leaves that name (`.NAME.hostagent-upload`) behind, without marks on
the file; the next upload to the same place removes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

from hostagent.data.backends.faults import fault
from hostagent.data.backends.holds import Held, Holds
from hostagent.data.backends.places import open_below, open_folder_below
from hostagent.data.backends.writing import Writer
from hostagent.errors import AgentError

SUFFIX = ".hostagent-upload"
NAME_MAX = 255
_ACL = "system.posix_acl_access"
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Body:
    """A Source of a stream's next bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read_into(self, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer) and (data := self._stream.read(len(buffer) - done)):
            buffer[done : done + len(data)] = data
            done += len(data)
        return done


def replace(
    path: str, folders: Sequence[str], holds: Holds, stream: BinaryIO, length: int, check: Callable[[], None]
) -> int:
    """The bytes written. PeerGone when the stream ends before; then, as after any other failure, all is as it was.
    `check` raises when it may not go on."""
    folder, name = open_folder_below(path, folders)
    try:
        with contextlib.ExitStack() as stack:
            old = _present(path, folders)
            if old is not None:
                stack.callback(old.close)
                stack.enter_context(old.marked())
            new = stack.enter_context(_made(folder, path, _part(name)))
            try:
                if old is not None:
                    _like(new, old)
                written = _filled(new, stream, length, check)
                _put_in_place(folder, _part(name), name, old)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(_part(name), dir_fd=folder)
                raise
            if old is not None:
                holds.retire(old)
            os.fsync(folder)
            return written
    except OSError as error:
        raise fault(error, path, "written") from error
    finally:
        os.close(folder)


def _part(name: str) -> str:
    part = f".{name}{SUFFIX}"
    if len(os.fsencode(part)) <= NAME_MAX:
        return part
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()}{SUFFIX}"


def _present(path: str, folders: Sequence[str]) -> Held | None:
    try:
        fd, true = open_below(path, folders, writable=True)
    except AgentError as error:
        if error.code == "not_found":
            return None
        raise
    return Held(fd, true, writable=True, ours=True)


@contextlib.contextmanager
def _made(folder: int, path: str, part: str) -> Iterator[Held]:
    """An empty file of that name, which stays ours for as long as it bears our marks."""
    try:
        fd = os.open(part, _NEW, 0o600, dir_fd=folder)
    except FileExistsError:
        _remove_stale(folder, path, part)
        fd = os.open(part, _NEW, 0o600, dir_fd=folder)
    with contextlib.closing(Held(fd, path, writable=True, ours=True)) as new, _alone(new, folder, path, part):
        yield new


def _remove_stale(folder: int, path: str, part: str) -> None:
    """What an upload left that nobody works on any more: who does holds its marks."""
    try:
        fd = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return
    with contextlib.closing(Held(fd, path, writable=True, ours=True)) as left, _alone(left, folder, path, part):
        os.unlink(part, dir_fd=folder)


@contextlib.contextmanager
def _alone(held: Held, folder: int, path: str, part: str) -> Iterator[None]:
    """Marked, and still the file of that name: whoever removes it marks it before."""
    try:
        held.mark()
    except AgentError as error:
        raise _under_way(path) from error
    try:
        if not (stat.S_ISREG(os.fstat(held.fd).st_mode) and _is_named(held, folder, part)):
            raise _under_way(path)
        yield
    finally:
        held.unmark()


def _is_named(held: Held, folder: int, name: str) -> bool:
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(held.fd))


def _like(new: Held, old: Held) -> None:
    """The old file's owner, mode and access list."""
    made, like = os.fstat(new.fd), os.fstat(old.fd)
    if (made.st_uid, made.st_gid) != (like.st_uid, like.st_gid):
        os.fchown(new.fd, like.st_uid, like.st_gid)
    os.fchmod(new.fd, stat.S_IMODE(like.st_mode))
    try:
        access = os.getxattr(old.fd, _ACL)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return
        raise
    os.setxattr(new.fd, _ACL, access)


def _filled(new: Held, stream: BinaryIO, length: int, check: Callable[[], None]) -> int:
    written = Writer().copy(Body(stream), new, 0, length, end=length, check=check)
    new.sync()
    return written


def _put_in_place(folder: int, part: str, name: str, old: Held | None) -> None:
    if old is None:
        os.link(part, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)  # replaces nothing
        os.unlink(part, dir_fd=folder)
        return
    if not _is_named(old, folder, name):
        message = f"{old.name} was replaced by somebody else during the upload"
        raise AgentError("image_changed", message, value=old.name, remedy="see what it is, then upload again")
    os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)


def _under_way(path: str) -> AgentError:
    remedy = "wait until it has ended"
    return AgentError("busy", f"another upload to {path} is under way", value=path, remedy=remedy)
