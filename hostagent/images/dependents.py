"""Who stands on a file: the images whose header names it as backing file.

QEMU guards nobody who is not open: a base can be written, or deleted, while another overlay stands on it. So before we
do either, the folders in which such overlays can lie are searched (a member of a chain lies in its overlay's own folder
or in a pool, so its overlays do, too, or in a pool). Each header is read by the bounded reader; nothing else of a file
is. For a file in /dev the host's block devices are its neighbours. What cannot be judged is an error, for then nobody
can say that the file is free; but of a device that cannot be read, or may not be, nobody here has images. All of this
blocks: use a thread.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostagent.images.header import read_header
from jobs.errors import JobError
from jobs.model import FileId

DEV = Path("/dev")
_GIVES_NOTHING = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM, errno.EPERM, errno.EACCES)
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ScanLimits:
    """`entries` of one folder, `timeout` seconds for all of a search; images.scan_entries, images.scan_timeout."""

    entries: int = 100_000
    timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class Dependent:
    """An image, and the file that it stands on."""

    path: str
    on: FileId


def find_dependents(
    files: Collection[FileId],
    *,
    folders: Sequence[Path],
    pools: Sequence[Path] = (),
    limits: ScanLimits,
    skip: Collection[FileId] = (),
) -> list[Dependent]:
    """The images in `folders` (not below them) and anywhere in `pools`, other than `skip`, that stand on `files`.

    Raises JobError: `limit` when a folder is too large, `timeout` when the search takes too long, `image_invalid` when
    an image's header cannot be trusted, and so may hide what it stands on.
    """
    deadline = time.monotonic() + limits.timeout
    found = []
    everywhere = [*folders, *(folder for pool in pools for folder in _below(pool, deadline, limits))]
    for folder in dict.fromkeys(Path(os.path.realpath(folder)) for folder in everywhere):
        for path in _devices() if folder == DEV else _files(folder, limits):
            _in_time(folder, deadline, limits)
            on = _stands_on(path, skip)
            if on in files and on is not None:
                found.append(Dependent(str(path), on))
    return found


def _in_time(folder: Path, deadline: float, limits: ScanLimits) -> None:
    if time.monotonic() > deadline:
        raise JobError(
            "timeout",
            f"the images in {str(folder)!r} were not looked through in {limits.timeout:g} s",
            remedy="raise images.scan_timeout, so that it is known whether an image stands on the file",
        )


def _below(pool: Path, deadline: float, limits: ScanLimits) -> Iterator[Path]:
    """The pool's folders; a link to a folder is none of them."""
    if pool.is_block_device():  # as a backing file it is known by itself
        return
    for folder, _, _ in os.walk(pool, onerror=_unreadable):
        _in_time(Path(folder), deadline, limits)
        yield Path(folder)


def _files(folder: Path, limits: ScanLimits) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            for count, entry in enumerate(entries):
                if count >= limits.entries:
                    raise JobError(
                        "limit",
                        f"{str(folder)!r} has more than {limits.entries} entries",
                        remedy="raise images.scan_entries, so that it is known whether an image stands on the file",
                    )
                if entry.is_file(follow_symlinks=False):
                    yield Path(entry.path)
    except OSError as error:
        _unreadable(error)


def _devices() -> Iterator[Path]:
    """The host's block devices that have a medium: an image on one may stand on another."""
    for device in sorted(Path("/sys/class/block").glob("*")):
        try:
            if int((device / "size").read_text()):
                yield DEV / device.name.replace("!", "/")
        except (OSError, ValueError):
            continue


def _unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a pool that does not exist holds no image
        remedy = "let the agent read the folder"
        raise JobError("denied", f"{error.filename!r} cannot be searched: {error.strerror}", remedy=remedy) from error


def _stands_on(path: Path, skip: Collection[FileId]) -> FileId | None:
    """The identity of the file's backing file; None for a file that names none, or that is none any more."""
    try:
        fd = os.open(path, _READ)
    except FileNotFoundError:
        return None
    except OSError as error:
        if path.is_relative_to(DEV) and error.errno in _GIVES_NOTHING:
            return None
        remedy = "let the agent read it, or move it out of the folder"
        raise JobError("denied", f"{str(path)!r} cannot be read: {error.strerror}", remedy=remedy) from error
    try:
        own = os.fstat(fd)
        if not (stat.S_ISREG(own.st_mode) or stat.S_ISBLK(own.st_mode)) or FileId(own.st_dev, own.st_ino) in skip:
            return None
        try:
            header = read_header(fd)
        except OSError as error:
            if stat.S_ISBLK(own.st_mode) and error.errno in _GIVES_NOTHING:
                return None
            raise JobError("io_error", f"{str(path)!r} cannot be read: {error.strerror}", value=str(path)) from error
        except JobError as error:
            message = f"whether an image stands on the file cannot be known: {error.message}"
            remedy = f"repair {str(path)!r}, or move it out of the folder"
            raise JobError(error.code, message, remedy=remedy, value=str(path)) from error
    finally:
        os.close(fd)
    if header is None or header.backing is None:
        return None
    try:
        base = (path.parent / header.backing).stat()
    except OSError:
        return None  # it stands on nothing that is there
    return FileId(base.st_dev, base.st_ino)
