"""Opening what a download writes: new, or as an earlier one has left it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hostagent import blocks
from hostagent.client.journal import Identity, Journal, misfit
from hostagent.client.layers import open_layers
from hostagent.client.options import Options
from hostagent.client.place import Place
from hostagent.client.progress import Tell
from hostagent.client.rawimage import failed
from hostagent.client.storage import StorageDaemon, account
from hostagent.client.target import ServedTarget, Target, refuse_existing
from hostagent.errors import AgentError
from hostagent.rangeset import RangeSet

PART, JOURNAL = ".part", ".hostagent-resume"
SECTOR = 512


@contextlib.contextmanager
def opened(place: Place, options: Options, tell: Tell) -> Iterator[Target]:
    """The place, with what an earlier download has left there where that is proven to be of the same image."""
    path = Path(place.path)
    try:
        if path.is_block_device():
            with _device(place, options, tell) as target:
                yield target
            return
        with _part(place, options, tell) as target:
            yield target
    except OSError as error:
        raise failed(error, place.path, "written") from error


@contextlib.contextmanager
def _device(place: Place, options: Options, tell: Tell) -> Iterator[Target]:
    if place.is_qcow2:
        raise AgentError("invalid", "a block device is written as raw", field="format", remedy="--format raw")
    try:
        fd = os.open(place.path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            message = f"{place.path} is in use: it is mounted, or another device stands on it"
            raise AgentError("busy", message) from error
        raise
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        room = blocks.size_of(fd)
        if room < place.size:
            message = f"{place.path} has {room} bytes, and the image {place.size}"
            raise AgentError("no_space", message, remedy="use a larger device")
        journal = None
        if options.journal:
            journal = Journal.open(Path(options.journal), tell)
            stack.callback(journal.close)
            _taken_over(journal, place.identity([os.fstat(fd).st_rdev, room]), options, tell)
        yield Target(place, fd, Path(place.path), journal, fresh=False)


@contextlib.contextmanager
def _part(place: Place, options: Options, tell: Tell) -> Iterator[Target]:
    final = Path(place.path)
    if not final.parent.is_dir():
        raise AgentError("not_found", f"there is no folder {final.parent}")
    refuse_existing(final, force=place.force)
    part = final.with_name(final.name + PART)
    with contextlib.ExitStack() as stack:
        journal = Journal.open(Path(options.journal or f"{final}{JOURNAL}"), tell)
        stack.callback(journal.close)
        fd, resumed = _opened_part(place, part, journal, options, tell)
        stack.callback(os.close, fd)
        if not resumed:
            journal.begin(place.identity(_name_of(fd)), RangeSet())
        if not place.is_qcow2:
            if not resumed:
                _shaped(fd, place)
            yield Target(place, fd, part, journal, fresh=not resumed)
            return
        below = None
        if place.backing:
            storage = options.storage
            backing = place.backing if place.backing.startswith("/") else str(final.parent / place.backing)
            below = stack.enter_context(open_layers(backing, place.backing_format, storage.pools, storage.layers_most))
        fds = [fd, *(layer.fd for layer in below.all)] if below else [fd]
        daemon = stack.enter_context(StorageDaemon(options.storage, fds))
        with _owned(fd, options.storage.user):
            if not resumed:
                daemon.create(fd, -(-place.size // SECTOR) * SECTOR, below)
            daemon.open_new(fd, below)
        yield ServedTarget(place, fd, part, journal, fresh=not resumed, daemon=daemon)


def _opened_part(place: Place, part: Path, journal: Journal, options: Options, tell: Tell) -> tuple[int, bool]:
    """FILE.part, and whether it goes on with what is there."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(part, flags)
    except FileNotFoundError:
        if journal.head is not None and len(journal.durable):
            tell(f"starting over, {part} is gone")
        return os.open(part, flags | os.O_CREAT | os.O_EXCL, 0o666), False
    try:
        why = _not_to_be_resumed(place, fd, part, journal, options)
    except BaseException:
        os.close(fd)
        raise
    if why is None:
        journal.begin(place.identity(_name_of(fd)), journal.durable)
        tell(f"going on with a download that was cut off: {len(journal.durable)} bytes are there already")
        return fd, True
    os.close(fd)
    if why:
        tell(f"starting over, {part} and its journal do not count: {why}")
    part.unlink()
    return os.open(part, flags | os.O_CREAT | os.O_EXCL, 0o666), False


def _not_to_be_resumed(place: Place, fd: int, part: Path, journal: Journal, options: Options) -> str | None:
    """Why not; "" where nothing is lost by it. Raises AgentError for a file that is not ours to throw away."""
    head, name, found = journal.head, _name_of(fd), os.fstat(fd)
    ours = head is not None and head.get("local") == name
    if not stat.S_ISREG(found.st_mode) or not (ours or found.st_size == 0):
        message = f"{part} exists, and is not what a download that was cut off has left"
        raise AgentError("conflict", message, remedy="move it away, or remove it")
    if head is None or not ours or not len(journal.durable):
        return ""
    return misfit(head, place.identity(name), options.resume)


def _taken_over(journal: Journal, identity: Identity, options: Options, tell: Tell) -> None:
    durable = RangeSet()
    if journal.head is not None:
        why = misfit(journal.head, identity, options.resume)
        if why is None:
            durable = journal.durable
            tell(f"going on with a download that was cut off: {len(durable)} bytes are there already")
        else:
            tell(f"starting over, the journal {journal.path} does not count: {why}")
    journal.begin(identity, durable)


def _name_of(fd: int) -> list[int]:
    """Which file it is, whatever is written to it."""
    found = os.fstat(fd)
    return [found.st_dev, found.st_ino]


def _shaped(fd: int, place: Place) -> None:
    if place.preallocate and place.size:
        os.posix_fallocate(fd, 0, place.size)
    else:
        os.ftruncate(fd, place.size)


@contextlib.contextmanager
def _owned(fd: int, user: str) -> Iterator[None]:
    """Let the storage daemon's user open our new file, just for as long as it takes."""
    if os.geteuid() != 0 or user in ("", "root"):
        yield
        return
    before = os.fstat(fd)
    os.fchown(fd, account(user).pw_uid, -1)
    try:
        yield
    finally:
        os.fchown(fd, before.st_uid, -1)
