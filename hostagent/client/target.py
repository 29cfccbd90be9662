"""Where a download goes: FILE.part and its journal, which become FILE; or a block device, as it is."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hostagent.client.crew import Ends
from hostagent.client.extents import Piece
from hostagent.client.fetching import RawFetcher, StreamFetcher
from hostagent.client.journal import Journal
from hostagent.client.layers import Layer, Layers
from hostagent.client.local import Image, RawImage, ServedImage
from hostagent.client.place import Place
from hostagent.client.rawimage import RawWriter
from hostagent.client.remote import Remote
from hostagent.client.storage import StorageDaemon
from hostagent.client.throttle import Throttle
from hostagent.errors import AgentError
from hostagent.rangeset import RangeSet


class Target:
    """`durable`: what an earlier download has left here. `reads_as_zeros`: wherever nothing was written yet."""

    def __init__(self, place: Place, fd: int, path: Path, journal: Journal | None, *, fresh: bool) -> None:
        self.place = place
        self.fd = fd
        self.path = path
        self.durable = journal.durable.copy() if journal else RangeSet()
        self._journal = journal
        self._fresh = fresh
        self._device = stat.S_ISBLK(os.fstat(fd).st_mode)

    @property
    def reads_as_zeros(self) -> bool:
        return self._fresh and not self.place.backing

    def record(self, pieces: list[Piece]) -> None:
        if self._journal is not None:
            self._journal.record((one.begin, one.end) for one in pieces)

    def fetcher(self, remote: Remote, throttle: Throttle) -> Ends:
        sparse = not self._device and not self.place.preallocate
        writer = RawWriter(self.fd, str(self.path), fresh=self._fresh, sparse=sparse)
        return RawFetcher(remote, writer, throttle)

    @contextlib.contextmanager
    def unless_right(self) -> Iterator[Image]:
        """The image as it is now, to be proven. Where that fails it is deleted: nobody shall go on from there."""
        try:
            yield self._image()
        except AgentError as error:
            if error.code == "mismatch" and not self._device:
                self.path.unlink(missing_ok=True)
                if self._journal is not None:
                    self._journal.remove()
            raise

    def _image(self) -> Image:
        layer = Layer(str(self.path), self.fd, "raw", self.place.size, self._device, None)
        return RawImage(Layers([layer]))

    def finish(self) -> None:
        """It is whole: its name is its own from now on."""
        os.fsync(self.fd)
        if not self._device:
            final = Path(self.place.path)
            _named(self.path, final, force=self.place.force)
            _sync(final.parent)
        if self._journal is not None:
            self._journal.remove()


class ServedTarget(Target):
    """A qcow2 image, which a storage daemon writes."""

    def __init__(
        self, place: Place, fd: int, path: Path, journal: Journal | None, *, fresh: bool, daemon: StorageDaemon
    ) -> None:
        super().__init__(place, fd, path, journal, fresh=fresh)
        self._daemon = daemon
        self._served = ServedImage(daemon, place.size)

    def fetcher(self, remote: Remote, throttle: Throttle) -> Ends:
        return StreamFetcher(remote, self._served.stream(), throttle)

    def _image(self) -> Image:
        return self._served

    def finish(self) -> None:
        self._daemon.end()  # which writes what it knew only by itself
        super().finish()


def refuse_existing(final: Path, *, force: bool) -> None:
    try:
        found = final.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        raise AgentError("conflict", f"{final} exists, and is no regular file", remedy="name another file")
    if not force:
        raise AgentError("conflict", f"{final} exists", remedy="name another file, or --force to replace it at the end")


def _named(part: Path, final: Path, *, force: bool) -> None:
    """From FILE.part to FILE; what got that name meanwhile is not overwritten."""
    if force:
        part.rename(final)
        return
    try:
        os.link(part, final, follow_symlinks=False)
    except FileExistsError as error:
        message = f"{final} came to be meanwhile; the image is whole, as {part}"
        raise AgentError("conflict", message, remedy=f"name it yourself: mv {part} …") from error
    except OSError:  # a file system without hard links
        refuse_existing(final, force=False)
        part.rename(final)
        return
    part.unlink()


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
