"""Opening a file that a ticket names, below the folders that the daemon may serve from.

As hostagent.images.member does it: the path is taken hold of without opening anything, the kernel says where it truly
lies, with every link and `..` resolved, and what kind of thing it is; only then is it opened, through that same
descriptor, so that no swap of the path in between has an effect. A final link is not followed, except those by which
root names devices (`/dev/VG/LV`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hostagent.data.backends.faults import fault
from hostagent.errors import AgentError
from hostagent.inodes import GRASP, device_link, device_node, has_no_storage, kind_name
from hostagent.qcow2 import is_plain, shown

_FLAGS = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
PATH_MAX = 4096  # the kernel's own limit


def path_of(url: str) -> str:
    """The absolute path of a `file:` URL."""
    parts = urlsplit(url)
    path = unquote(parts.path, errors="surrogateescape")
    usable = path.startswith("/") and is_plain(path) and len(os.fsencode(path)) < PATH_MAX
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not usable:
        remedy = "file:///ABSOLUTE/PATH, with %3F for ? and %23 for #"
        raise AgentError("invalid", f"{shown(url)} names no file", field="url", value=url[:200], remedy=remedy)
    return path


def open_below(path: str, folders: Sequence[str], *, writable: bool) -> tuple[int, str]:
    """A descriptor, and the file's true path. A device that is to be written is claimed (open(2), O_EXCL), so one that
    is mounted or a part of another is refused."""
    with _explained(path):
        # By name first: of what lies elsewhere not even its existence is told.
        folder, name = os.path.split(path)
        _refuse_place(Path(os.path.realpath(folder), name), path, folders)
        link = device_link(path)
        handle = os.open(os.path.realpath(link) if link else path, GRASP)
        try:
            true = _judge(handle, path, folders, link)
            claim = os.O_EXCL if writable and true.is_block_device() else 0
            access = os.O_RDWR if writable else os.O_RDONLY
            return os.open(f"/proc/self/fd/{handle}", access | claim | _FLAGS), str(true)
        finally:
            os.close(handle)


def open_folder_below(path: str, folders: Sequence[str]) -> tuple[int, str]:
    """A descriptor of the folder that the file `path` lies in or is to lie in, and the file's name there."""
    folder, name = os.path.split(path)
    with _explained(path):
        _refuse_place(Path(os.path.realpath(folder), name), path, folders)
        handle = os.open(os.path.realpath(folder), GRASP)
        try:
            _refuse_place(_true(handle) / name, path, folders)
            return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), name
        finally:
            os.close(handle)


def check_usable(fd: int, name: str) -> os.stat_result:
    """What is handed over must be a regular file or a block device, too."""
    found = os.fstat(fd)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        raise _unusable(f"{name} is {kind_name(found.st_mode)}, not an image", name)
    return found


def _judge(handle: int, path: str, folders: Sequence[str], link: Path | None) -> Path:
    true = _true(handle)
    _refuse_place(link or true, path, folders)
    found = os.fstat(handle)
    if stat.S_ISLNK(found.st_mode):
        target = shown(os.readlink("", dir_fd=handle))
        raise _unusable(f"{path} is a symbolic link, which is not followed", path, f"name its target, {target}, itself")
    check_usable(handle, path)
    if stat.S_ISBLK(found.st_mode):
        # The same device by another node would have other locks.
        if str(true) != (node := device_node(found.st_rdev)):
            raise _unusable(f"{path} is not the node by which the kernel knows the device", path, f"name {node}")
        return true
    if found.st_nlink != 1:
        why = f"has {found.st_nlink} hard links" if found.st_nlink else "was removed while it was opened"
        raise _unusable(f"{path} {why}, so its folder does not tell whose it is", path, "make a copy, and use that")
    if not found.st_blocks and has_no_storage(handle):
        raise _unusable(f"{path} is a view of the kernel or a device, not a stored file", path)
    return true


def _true(handle: int) -> Path:
    return Path(f"/proc/self/fd/{handle}").readlink()


def _refuse_place(true: Path, path: str, folders: Sequence[str]) -> None:
    if not any(true.is_relative_to(os.path.realpath(folder)) for folder in folders):
        remedy = "add its folder to data.allow_paths, if the daemon may serve what lies there"
        raise AgentError("denied", f"{path} lies in no folder that this daemon may serve", value=path, remedy=remedy)


def _unusable(message: str, path: str, remedy: str = "name an image that is a regular file or a device") -> AgentError:
    return AgentError("invalid", message, field="url", value=path, remedy=remedy)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EINVAL:  # by readlink(2), of what was a link a moment ago
            message, remedy = f"{path} changed while it was opened", "see who replaces a link among its folders"
            raise AgentError("image_changed", message, value=path, remedy=remedy) from error
        raise fault(error, path, "opened") from error
