"""Opening one member of a chain, without trusting whoever named it.

A header names its backing file, and whoever wrote the header may have meant /etc/shadow or a device. So a file is
grasped with O_PATH first, which opens nothing and has no side effect on any kind of file; its true place (the kernel's
name for the descriptor, every folder link resolved), its kind and its link count are judged; and only then is it opened
for reading, through that same descriptor, so that no swap of the path in between has an effect.

A file may be used when it is a regular one or a block device, has one name, and lies directly in the folder of the
overlay that names it or anywhere below a configured pool. The top, which a person names, may lie anywhere unless the
limits say otherwise. No folder says of a device whose it is, so one that a header names must be in a pool: itself, or
by the link that leads to it (`/dev/VG/LV`). Such links, which only root makes, are followed; at a path's end no others
are.

Who may name images in pools only learns of what lies elsewhere nothing but the name that he gave, also through a
header: not where a link leads, nor whether there is anything. So of him names are judged before files are.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hostagent.images.header import is_plain, shown
from hostagent.inodes import DEVICES, GRASP, device_link, device_node, has_no_storage, kind_name
from jobs.errors import JobError
from jobs.model import Layer

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ChainLimits:
    """`pools` are absolute folders. 200 layers is what libvirt allows, and QEMU opens them in 0.2 s."""

    pools: tuple[str, ...] = ()
    max_depth: int = 200
    top_anywhere: bool = True


@dataclass(frozen=True, slots=True)
class Wanted:
    """A member to open: the path, the format if it is said, and the overlay that names it (None for the top)."""

    path: str
    format: str | None
    overlay: Layer | None = None

    def __str__(self) -> str:
        return f"{self.path}, the backing file of {self.overlay.path}," if self.overlay else self.path


def open_member(wanted: Wanted, limits: ChainLimits) -> tuple[int, str]:
    """A descriptor open for reading, and the file's true path. The caller closes the descriptor."""
    named = wanted.path if limits.top_anywhere else _in_its_place(wanted, limits)
    with _os_errors(wanted):
        link = device_link(named)
        handle = os.open(os.path.realpath(link) if link else named, GRASP)
        try:
            path = _judge(handle, wanted, limits, link)
            return os.open(f"/proc/self/fd/{handle}", _READ), path
        finally:
            os.close(handle)


def _in_its_place(wanted: Wanted, limits: ChainLimits) -> str:
    """Its path, folders resolved, if that lies where it may."""
    if wanted.overlay is None and not stays(Path(wanted.path), limits.pools):
        raise _outside(Path(wanted.path), wanted, limits)
    folder, name = os.path.split(wanted.path)
    with _os_errors(wanted):
        named = Path(os.path.realpath(folder), name)
    _refuse_place(named, wanted, limits)
    return str(named)


def stays(path: Path, pools: Sequence[str]) -> bool:
    """Whether each step of the name, as it is written, is in a pool or on the way to one; and the last in one."""
    places = [place for pool in pools for place in (Path(pool), Path(pool).resolve())]
    at = Path("/")
    for part in path.parts[1:]:
        at = at.parent if part == ".." else at / part
        if not any(at.is_relative_to(place) or place.is_relative_to(at) for place in places):
            return False
    return any(at.is_relative_to(place) for place in places)


def _judge(handle: int, wanted: Wanted, limits: ChainLimits, link: Path | None) -> str:
    """Say where the file truly lies, or refuse it. Place first: of a file that lies elsewhere nothing else is told."""
    found = os.fstat(handle)
    path = str(Path(f"/proc/self/fd/{handle}").readlink())
    if found.st_nlink == 0:
        raise changed(wanted.path, "it was removed while it was opened")
    if not path.startswith("/") or not is_plain(path):
        raise JobError("image_invalid", f"{wanted} lies at {shown(path)}, which is no usable path", value=path)
    if link is None or not _in_pool(link, limits):
        _refuse_place(Path(path), wanted, limits)
    _refuse_kind(handle, found, path, tell=limits.top_anywhere)
    if found.st_nlink > 1:
        raise JobError(
            "outside_pools",
            f"{path} has {found.st_nlink} hard links, so the folder does not tell whose it is",
            remedy=f"make a copy, and use that: cp --sparse=always {shlex.quote(path)} {shlex.quote(path + '.copy')}",
            value=path,
        )
    return path


def _refuse_place(path: Path, wanted: Wanted, limits: ChainLimits) -> None:
    if wanted.overlay is None and limits.top_anywhere:
        return
    overlay = wanted.overlay
    if overlay is not None and not overlay.device and path.parent == Path(overlay.path).parent:
        return
    if _in_pool(path, limits):
        return
    raise _outside(path, wanted, limits)


def _outside(path: Path, wanted: Wanted, limits: ChainLimits) -> JobError:
    where = "in no configured pool" if wanted.overlay is None else "neither in that image's folder nor in a pool"
    place = str(path) if limits.top_anywhere else wanted.path
    found = f" (it is {place})" if place != wanted.path else ""
    remedy = "move the image, or add its folder to images.pools"
    return JobError("outside_pools", f"{wanted} lies {where}{found}", remedy=remedy, value=place)


def _in_pool(path: Path, limits: ChainLimits) -> bool:
    return any(path.is_relative_to(Path(pool).resolve()) for pool in limits.pools)


def _refuse_kind(handle: int, found: os.stat_result, path: str, *, tell: bool) -> None:
    """`tell`: where a link leads."""
    mode = found.st_mode
    if stat.S_ISREG(mode):
        if not found.st_blocks and has_no_storage(handle):
            remedy = "name an image that lies on storage"
            message = f"{path} is a view of the kernel or a device, not a stored file"
            raise JobError("image_invalid", message, remedy=remedy, value=path)
        return
    if stat.S_ISLNK(mode):
        target = shown(os.readlink("", dir_fd=handle)) if tell else "if that is in a pool,"
        message = f"{path} is a symbolic link, and the last step of an image's path is not followed"
        raise JobError("image_invalid", message, remedy=f"name its target, {target} itself", value=path)
    if stat.S_ISBLK(mode):
        # The same device by another node would have other locks, and another name in the ledger.
        if path != (node := device_node(found.st_rdev)):
            message = f"{path} is not the node by which the kernel knows the device"
            raise JobError("image_invalid", message, remedy=f"name {node or f'its node in {DEVICES}'}", value=path)
        return
    remedy = "name an image that is a regular file"
    raise JobError("image_invalid", f"{path} is {kind_name(mode)}, not an image", remedy=remedy, value=path)


def changed(path: str, what: str) -> JobError:
    """The error for a file that is not what it was."""
    return JobError("image_changed", f"{path} has changed: {what}", remedy="look at it again, then retry", value=path)


@contextmanager
def _os_errors(wanted: Wanted) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        code, remedy = _OS_ERRORS.get(error.errno or 0, ("io_error", None))
        reason = os.strerror(error.errno or 0)
        raise JobError(code, f"{wanted} cannot be opened: {reason}", remedy=remedy, value=wanted.path) from error


_MISSING = "correct the path, or restore the file"
_OS_ERRORS: dict[int, tuple[str, str | None]] = {
    errno.ENOENT: ("not_found", _MISSING),
    errno.ENOTDIR: ("not_found", _MISSING),
    errno.EACCES: ("denied", "let the agent's user read the file and search its folders"),
    errno.EPERM: ("denied", "let the agent's user read the file and search its folders"),
    errno.ELOOP: ("image_invalid", "untangle the symbolic links among its folders"),
    errno.EINVAL: ("image_invalid", "see that no link among its folders is replaced meanwhile, and try again"),
    errno.ENAMETOOLONG: ("image_invalid", "use a shorter path"),
    errno.EMFILE: ("limit", "raise the agent's limit of open files (LimitNOFILE=)"),
    errno.ENFILE: ("limit", "raise the host's limit of open files (fs.file-max)"),
}
