"""Fetches an image from a data daemon into a local file, sparse; under its name only when it is whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from hostagent.client.crew import Crew, Ends
from hostagent.client.extents import Extent, Kind, Piece, cut
from hostagent.client.opening import opened
from hostagent.client.options import REQUEST_MOST, Options
from hostagent.client.place import Place
from hostagent.client.progress import Progress, Show, Tell, nobody
from hostagent.client.remote import Remote
from hostagent.client.result import Result, anew, checked, verified
from hostagent.client.server import Extents, Server, ask, contact, read_extents, size_of
from hostagent.client.target import Target
from hostagent.client.throttle import Throttle
from hostagent.errors import AgentError
from hostagent.extents import clipped


@dataclass(frozen=True, slots=True)
class Download:
    """`format`: raw or qcow2; None goes by the file's name. `backing`: the image that a new qcow2 stands on; what the
    server's has not allocated is left to it, or with `incremental` what is not dirty there."""

    url: str
    path: str
    format: str | None = None
    backing: str | None = None
    backing_format: str | None = None
    incremental: bool = False
    preallocate: bool = False
    force: bool = False


def download(work: Download, options: Options, *, show: Show = nobody, tell: Tell = nobody) -> Result:
    """All of the image, durably. A file is written as FILE.part, and has its name when it is whole.

    Raises AgentError. What was durable before an error, or a kill, need not be fetched again."""
    checked(options)
    _refuse_nonsense(work, options)

    def run(options: Options) -> Result:
        show(Progress("connecting"))
        server = contact(work.url, options, tell)
        return _Fetching(work, server, show, tell).run()

    return anew(run, options, tell)


def _refuse_nonsense(work: Download, options: Options) -> None:
    if work.format not in (None, "raw", "qcow2"):
        raise AgentError("invalid", f"the format {work.format!r} is not raw or qcow2", field="format")
    qcow2 = work.format == "qcow2" or (work.format is None and work.path.endswith(".qcow2"))
    if work.backing and not qcow2:
        raise AgentError("invalid", "only a qcow2 image has a backing file", field="backing", remedy="--format qcow2")
    if work.incremental and not work.backing:
        message = "an incremental download stands on what was there before"
        raise AgentError("invalid", message, field="incremental", remedy="name it with --backing FILE")
    if work.preallocate and qcow2:
        raise AgentError("invalid", "only a raw file is preallocated", field="preallocate")
    if options.verify and work.backing and not work.incremental:
        message = "an image and its backing file are not what the server has: its checksum cannot be compared"
        raise AgentError("invalid", message, field="verify", remedy="compare the whole image when all is there")


class _Fetching:
    def __init__(self, work: Download, server: Server, show: Show, tell: Tell) -> None:
        self._work = work
        self._server = server
        self._options = server.options
        self._show = show
        self._tell = tell
        self._stop = threading.Event()
        self._throttle = Throttle(self._options.bandwidth, self._stop)

    def run(self) -> Result:
        began = time.monotonic()
        extents, size = self._looked()
        features, address = self._server.features, self._server.dial.addresses[0]
        if self._options.verify and not features.checksum:
            raise AgentError("not_supported", f"{address} computes no checksums", remedy="go without --verify")
        workers = min(self._options.workers, features.readers)
        with opened(self._place(size), self._options, self._tell) as target:
            done = target.durable.copy()
            crew = Crew(
                cut(self._runs(extents, size, target), done.copy(), self._options.request_size, REQUEST_MOST),
                lambda: self._fetcher(target),
                self._options,
                size=size,
                done=done,
                record=target.record,
                stop=self._stop,
                tell=self._tell,
            )
            crew.run(workers, self._show)
            seconds = time.monotonic() - began
            checksum = None
            if self._options.verify:
                with target.unless_right() as image:
                    checksum = verified(self._server, image, size, self._show, self._tell)
            target.finish()
        return Result(
            operation="download",
            path=self._work.path,
            server=str(address),
            size=size,
            moved=crew.count.moved,
            zeroed=crew.count.zeroed,
            resumed=len(done),
            retries=crew.count.retries,
            workers=workers,
            seconds=seconds,
            checksum=checksum,
        )

    def _looked(self) -> tuple[Extents | None, int]:
        """What the image has where, as far as the server tells, and its size."""
        wanted = self._server.features.extents or self._work.incremental

        def look(remote: Remote) -> tuple[Extents | None, int | None]:
            extents = read_extents(remote, self._server, dirty=self._work.incremental) if wanted else None
            return extents, size_of(self._server, remote, extents)

        extents, size = ask(self._server, look, self._tell)
        address = self._server.dial.addresses[0]
        if size is None:
            raise AgentError("io_error", f"{address} does not tell the image's size")
        if extents is not None and extents.size < size:
            message = f"{address} tells of {extents.size} bytes of an image of {size}"
            raise AgentError("io_error", message)
        return extents, size

    def _place(self, size: int) -> Place:
        work = self._work
        return Place(
            path=work.path,
            format=work.format,
            size=size,
            backing=work.backing,
            backing_format=work.backing_format,
            incremental=work.incremental,
            preallocate=work.preallocate,
            force=work.force,
            etag=self._server.features.etag,
            ticket=self._server.dial.addresses[0].secret,
        )

    def _runs(self, extents: Extents | None, size: int, target: Target) -> Iterator[Piece]:
        if extents is None:
            yield Piece(0, size, Kind.DATA)
            return
        for one in clipped(extents, 0, size):
            yield Piece(one.start, one.start + one.length, self._kind(one, target))

    def _kind(self, one: Extent, target: Target) -> Kind:
        if self._work.incremental and not one.dirty:
            return Kind.SKIP
        if not one.zero:
            return Kind.DATA
        if self._work.backing and not self._work.incremental and one.hole:
            return Kind.SKIP
        return Kind.SKIP if target.reads_as_zeros else Kind.ZERO

    def _fetcher(self, target: Target) -> Ends:
        return target.fetcher(self._server.remote(), self._throttle)
