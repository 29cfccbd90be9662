"""The file that a copy makes, from its unfinished name to its own. All of this blocks.

A target that we make lies under a name of its own (`.hostagent-JOB`) in its folder until the copy is complete and
durable; then it is given its name, in one step that replaces nothing.

Its folder may be its owner's to swap for a link at any moment, and we may be root. So names are made and removed in a
folder that was opened, and known by where it lies (before there is a target) or by what lies in it (from then on).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from hostagent.images.header import is_empty, is_plain
from hostagent.images.member import stays
from jobs.errors import JobError
from jobs.model import FileId, Target

log = logging.getLogger(__name__)

ACL_GROUP_OBJ = 0x04  # linux/posix_acl.h
OWN = ".hostagent-"
"""How the name of an unfinished file begins."""


def unfit(path: str, why: str, remedy: str) -> JobError:
    return JobError("invalid", f"{path!r} {why}", field="dest", value=path, remedy=remedy)


def _outside(dest: str) -> JobError:
    remedy = "copy into a pool, or add its folder to images.pools"
    return JobError("outside_pools", f"{dest!r} lies in no configured pool", field="dest", value=dest, remedy=remedy)


def part_of(target: Target, job_id: str) -> str:
    return str(Path(target.path).with_name(f"{OWN}{job_id}"))


def new(dest: str, format_: str, pools: Sequence[str] | None) -> Target:
    """A target that is not there yet; for who may not name any image it must lie in a pool."""
    if not is_plain(dest):
        raise unfit(dest, "contains control characters", "choose another name")
    if Path(dest).name.startswith(OWN):
        raise unfit(dest, f"is a name of the agent's own ({OWN}…)", "choose another name")
    if pools is not None and not stays(Path(dest), pools):
        raise _outside(dest)
    try:
        path = Path(os.path.realpath(Path(dest).parent), Path(dest).name)
    except OSError as error:  # of a link in /proc, or while somebody swaps the folder
        raise unfit(dest, f"does not lead to a folder: {error.strerror}", "give the folder's own path") from error
    if pools is not None and not any(path.is_relative_to(os.path.realpath(pool)) for pool in pools):
        raise _outside(dest)
    if not path.parent.is_dir():
        remedy = "make the folder, or correct the path"
        raise JobError("not_found", f"there is no folder {str(path.parent)!r}", field="dest", value=dest, remedy=remedy)
    try:
        os.lstat(path)
    except FileNotFoundError:
        return Target(str(path), format_, made=True)
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP):
            raise _os_error(Target(str(path), format_, made=True), error) from error
        raise unfit(dest, f"cannot be a file's name there: {error.strerror}", "choose another name") from error
    remedy = "choose another name; to write over an existing image, say --reuse-external"
    raise JobError("conflict", f"{dest!r} exists", field="dest", value=dest, remedy=remedy)


def refuse_own_data(dest: str, fd: int) -> None:
    """A mirror of the top layer alone writes only what that layer has: whatever else the target holds would stay."""
    if not is_empty(fd):
        remedy = "see what it holds: a copy that was interrupted may have begun to write it; make it anew, and empty"
        raise unfit(dest, "has data of its own, which a shallow copy would leave in it", remedy)


def make(target: Target, source: int, size: int, *, own: bool = False) -> Target:
    """The target's file, empty, with the source's mode and, unless it is to be our `own`, owner. What lies there under
    the job's own name was left by an agent that was killed before it could say so."""
    assert target.part is not None
    like = os.fstat(source)
    part = Path(target.part)
    folder = _open_path(part.parent)
    if folder is None:
        message = f"{str(part.parent)!r} is another folder now"
        raise JobError("image_changed", message, field="dest", remedy="see who replaced it")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part.name, dir_fd=folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(part.name, flags, 0o600, dir_fd=folder)
        try:
            made = os.fstat(fd)
            if not own and (made.st_uid, made.st_gid) != (like.st_uid, like.st_gid):
                os.fchown(fd, like.st_uid, like.st_gid)
            os.fchmod(fd, _mode(source, like.st_mode))
            if target.format == "raw":
                os.ftruncate(fd, size)
            return replace(target, file=FileId(made.st_dev, made.st_ino))
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part.name, dir_fd=folder)
            raise _os_error(target, error) from error
        finally:
            os.close(fd)
    finally:
        os.close(folder)


def _open_path(path: Path) -> int | None:
    """The folder, if its path leads there without a link, so that it lies where it seems to; None if not."""
    try:
        folder = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return None
    if place(folder) != str(path):
        os.close(folder)
        return None
    return folder


def _mode(fd: int, mode: int) -> int:
    """The file's mode without its ACL, whose mask stands in the group's place (acl(5))."""
    try:
        acl = os.getxattr(fd, "system.posix_acl_access")
    except OSError:
        return mode & 0o777
    entries = struct.iter_unpack("<HHI", acl[4:])
    group = next((permissions for tag, permissions, _ in entries if tag == ACL_GROUP_OBJ), 0)
    return mode & 0o707 | group << 3


def reopen(target: Target) -> int:
    """A descriptor of the target's file, wherever it lies by now."""
    for path in (target.part, target.path):
        if path is None:
            continue
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _os_error(target, error) from error
        found = os.fstat(fd)
        if FileId(found.st_dev, found.st_ino) == target.file:
            return fd
        os.close(fd)
    remedy = "start the copy again; the image is what it was"
    raise JobError("image_changed", f"the target {target.path!r} is gone or replaced", field="dest", remedy=remedy)


def _leads_to(path: str, file: FileId | None) -> bool:
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return FileId(found.st_dev, found.st_ino) == file


def _named(target: Target) -> bool:
    """Whether the target's name leads to the target."""
    return _leads_to(target.path, target.file)


def place(fd: int) -> str:
    """Where the file that was opened lies by now; the kernel follows it through every renaming."""
    return str(Path(f"/proc/self/fd/{fd}").readlink())


def refuse_strange(target: Target, fd: int) -> None:
    """Raise when somebody moved the target, gave it a further name, or took the name that it is to have."""
    ours = [path for path in (target.part, target.path) if path is not None and _leads_to(path, target.file)]
    names = os.fstat(fd).st_nlink
    if not ours:
        where = place(fd)
        stays = names and (target.part is None or Path(where).name != Path(target.part).name)  # or it is deleted
        lies = f"; what was copied lies at {where!r}" if stays else ""
        raise _strange(target, f"was moved, deleted or replaced, or its folder was{lies}", "leave it where it is")
    if names > len(ours):
        why = f"has {names - len(ours)} more hard link(s), so that no path tells whose it is"
        raise _strange(target, why, f"remove them: find FOLDER -xdev -inum {os.fstat(fd).st_ino}")
    if target.path not in ours and os.path.lexists(target.path):
        raise _os_error(target, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)))


def _strange(target: Target, why: str, remedy: str) -> JobError:
    message = f"the target {target.path!r} {why}"
    return JobError("image_changed", message, field="dest", value=target.path, remedy=remedy)


def is_settled(target: Target) -> bool:
    """Whether the target has its name, on stable storage. An agent that was killed while it gave it may have left the
    other one: that goes, for a file with two names is nobody's for certain, and is refused everywhere."""
    if not _named(target):
        return False
    folder = _open_folder(target)
    try:
        _name_alone(target, folder)
    finally:
        os.close(folder)
    return True


def let_its_name_be_all(target: Target) -> None:
    """The target of a group that is decided needs the unfinished file's name no more. Idempotent. Where somebody took
    its own name from it meanwhile, that one is all that leads to the copy, and stays."""
    if not _named(target):
        if target.part is not None and _leads_to(target.part, target.file):
            fields = {"path": target.path, "lies_at": target.part}
            log.warning("a copy that is complete has lost its name", extra={"fields": fields})
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        folder = _open_folder(target)
        try:
            _name_alone(target, folder)
        finally:
            os.close(folder)


def give_name(target: Target) -> None:
    """Its name, durable, beside that of the unfinished file: until its group is decided both may have to go. Should it
    come through when the job has long failed, then there is no such file to be named."""
    own = reopen(target)
    try:
        refuse_strange(target, own)
        folder = _open_folder(target)
        try:
            _name(target, own, folder)
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _os_error(target, error) from error
    finally:
        os.close(own)


def settle(target: Target, fd: int, named: bool) -> None:
    """On stable storage, and if `named` under its name. Idempotent. Of its own descriptor: should it hang and come
    through when the job has long failed, then there is no such file to be named, and no other by that number."""
    own = os.dup(fd)
    try:
        os.fsync(own)
        refuse_strange(target, own)
        if target.part is not None and named:
            folder = _open_folder(target)
            try:
                _name(target, own, folder)
                _name_alone(target, folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise _os_error(target, error) from error
    finally:
        os.close(own)


def _open_folder(target: Target) -> int:
    """The folder that has the target, by either of its names. FileNotFoundError where another one lies there now."""
    folder = os.open(Path(target.path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    names = [Path(path).name for path in (target.part, target.path) if path is not None]
    if any(_lies_in(folder, name, target.file) for name in names):
        return folder
    os.close(folder)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def _lies_in(folder: int, name: str, file: FileId | None) -> bool:
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return FileId(found.st_dev, found.st_ino) == file


def _name(target: Target, fd: int, folder: int) -> None:
    name = Path(target.path).name
    try:
        # By descriptor, so that it is this file that gets the name; the folder makes it linkat(2), which follows.
        os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
    except OSError:
        if not _named(target):
            raise


def _name_alone(target: Target, folder: int) -> None:
    """Take the unfinished file's name from the target that has its own; durable."""
    if target.part is not None:
        name = Path(target.part).name
        if _lies_in(folder, name, target.file):
            os.unlink(name, dir_fd=folder)
    os.fsync(folder)


def delete(target: Target, job_id: str, place: str | None) -> None:
    """The file that was not sealed, by both its names: it may have got the second in the moment in which it failed.
    `place` is where it lies by now: our own name for it is taken from it wherever that is."""
    part = Path(target.part or part_of(target, job_id))
    try:
        if target.file is None:
            _unlink_any(part)
            return
        unlink(part, target.file)
        unlink(Path(target.path), target.file)
        if place is not None and Path(place).name == part.name:
            unlink(Path(place), target.file)
    except OSError as error:
        raise _os_error(target, error) from error


def unlink(path: Path, file: FileId) -> None:
    """Only the very file, in the folder in which it was seen. What is gone is gone, and what can be no name is none."""
    with _absent_is_gone():
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _lies_in(folder, path.name, file):
                os.unlink(path.name, dir_fd=folder)
        finally:
            os.close(folder)


def _unlink_any(part: Path) -> None:
    """Whatever has a job's own name, in the folder that the job has made it in."""
    with _absent_is_gone():
        folder = _open_path(part.parent)
        if folder is not None:
            try:
                os.unlink(part.name, dir_fd=folder)
            finally:
                os.close(folder)


@contextlib.contextmanager
def _absent_is_gone() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            raise


def _os_error(target: Target, error: OSError) -> JobError:
    code = {errno.ENOSPC: "no_space", errno.EDQUOT: "no_space", errno.EACCES: "denied", errno.EPERM: "denied"}
    remedies = {
        "conflict": "choose another name, or move what lies there away, and copy again",
        "no_space": "make space, or choose another folder",
        "denied": "let the agent write there",
    }
    found = "conflict" if isinstance(error, FileExistsError) else code.get(error.errno or 0, "io_error")
    return JobError(
        found,
        f"the target {target.path!r}: {os.strerror(error.errno or 0)}",
        field="dest",
        value=target.path,
        remedy=remedies.get(found, "see the storage below it (dmesg)"),
    )
