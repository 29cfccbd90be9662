"""Sends a local image to a data daemon: what a guest sees of it, its zeros as zeros."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hostagent.client.crew import Crew
from hostagent.client.extents import Kind, Piece, cut
from hostagent.client.journal import Identity, Journal, misfit
from hostagent.client.layers import Layers
from hostagent.client.local import Image, open_image
from hostagent.client.options import REQUEST_MOST, Options
from hostagent.client.progress import Progress, Show, Tell, nobody
from hostagent.client.rawimage import failed
from hostagent.client.result import Result, anew, checked, verified
from hostagent.client.sending import Sender
from hostagent.client.server import Server, ask, contact
from hostagent.client.throttle import Throttle
from hostagent.errors import AgentError
from hostagent.extents import merged
from hostagent.rangeset import RangeSet

SUFFIX = ".hostagent-resume"


@dataclass(frozen=True, slots=True)
class Upload:
    """`format`: raw or qcow2; None goes by the header. `target_is_zero`: what the server has reads as zeros already."""

    path: str
    url: str
    format: str | None = None
    target_is_zero: bool = False


def upload(work: Upload, options: Options, *, show: Show = nobody, tell: Tell = nobody) -> Result:
    """All of the local image to where the ticket leads, durably. What the server's image has beyond it becomes zeros.

    Raises AgentError. What was durable before an error, or a kill, need not be sent again: it stands in the journal."""
    checked(options)

    def run(options: Options) -> Result:
        show(Progress("connecting"))
        try:
            with open_image(work.path, work.format, options.storage) as (image, layers):
                server = contact(work.url, options, tell)
                return _Sending(work, image, layers, server, show, tell).run()
        except OSError as error:
            raise failed(error, error.filename or work.path, "used") from error

    return anew(run, options, tell)


class _Sending:
    def __init__(self, work: Upload, image: Image, layers: Layers, server: Server, show: Show, tell: Tell) -> None:
        self._work = work
        self._image = image
        self._layers = layers
        self._server = server
        self._options = server.options
        self._show = show
        self._tell = tell
        self._stop = threading.Event()
        self._throttle = Throttle(self._options.bandwidth, self._stop)

    def run(self) -> Result:
        began = time.monotonic()
        size = self._size()
        workers = min(self._options.workers, self._server.features.writers)
        with self._journal(size) as journal:
            done = journal.durable.copy() if journal else RangeSet()
            crew = Crew(
                cut(self._runs(size), done.copy(), self._options.request_size, REQUEST_MOST),
                self._sender,
                self._options,
                size=size,
                done=done,
                record=lambda pieces: journal.record((one.begin, one.end) for one in pieces) if journal else None,
                stop=self._stop,
                tell=self._tell,
            )
            crew.run(workers, self._show)
            seconds = time.monotonic() - began
            self._layers.refuse_change()
            checksum = (
                verified(self._server, self._image, size, self._show, self._tell) if self._options.verify else None
            )
            if journal:
                journal.remove()
        count = crew.count
        return Result(
            operation="upload",
            path=self._work.path,
            server=str(self._server.dial.addresses[0]),
            size=self._image.size,
            moved=count.moved,
            zeroed=count.zeroed,
            resumed=len(done),
            retries=count.retries,
            workers=workers,
            seconds=seconds,
            checksum=checksum,
        )

    def _size(self) -> int:
        """Bytes of the server's image, if it tells; else of ours."""
        features, address = self._server.features, self._server.dial.addresses[0]
        if not features.writable:
            raise AgentError("denied", f"the ticket at {address} allows no writing", remedy="ask for one that does")
        if self._options.verify and not features.checksum:
            raise AgentError("not_supported", f"{address} computes no checksums", remedy="go without --verify")
        size = features.size
        if size is None:
            size = ask(self._server, lambda remote: remote.total(), self._tell)
        ours = self._image.size
        if size is not None and size < ours:
            message = f"{self._work.path} has {ours} bytes, and the image at {address} {size}"
            raise AgentError("too_large", message, remedy="make that image larger, and ask for a ticket of its size")
        return max(size or 0, ours)

    def _runs(self, size: int) -> Iterator[Piece]:
        zero = Kind.SKIP if self._work.target_is_zero else Kind.ZERO
        for one in merged(self._image.extents()):
            yield Piece(one.start, one.start + one.length, zero if one.zero else Kind.DATA)
        if size > self._image.size:
            yield Piece(self._image.size, size, zero)

    def _sender(self) -> Sender:
        return Sender(self._server, self._server.remote(), self._image.reader(), self._throttle)

    @contextlib.contextmanager
    def _journal(self, size: int) -> Iterator[Journal | None]:
        journal = self._opened()
        if journal is None:
            yield None
            return
        try:
            identity = Identity(
                direction="upload",
                local=self._layers.identity,
                size=size,
                how={"format": self._layers.top.format, "target_is_zero": self._work.target_is_zero},
                etag=self._server.features.etag,
                ticket=self._server.dial.addresses[0].secret,
            )
            durable = RangeSet()
            if journal.head is not None:
                why = misfit(journal.head, identity, self._options.resume)
                if why is None:
                    durable = journal.durable
                    self._tell(f"going on with an upload that was cut off: {len(durable)} bytes are there already")
                else:
                    self._tell(f"starting over, the journal {journal.path} does not count: {why}")
            journal.begin(identity, durable)
            yield journal
        finally:
            journal.close()

    def _opened(self) -> Journal | None:
        """None where there can be none: then a kill costs the whole upload, and nothing else."""
        if not self._options.journal and self._layers.top.device:
            return None
        path = Path(self._options.journal or f"{self._work.path}{SUFFIX}")
        try:
            return Journal.open(path, self._tell)
        except AgentError as error:
            if error.code != "busy" or self._options.journal:
                raise
            self._tell(f"{error.message}; this upload keeps no journal")
        except OSError as error:
            if self._options.journal:
                message = f"the journal {path} cannot be written: {error.strerror}"
                raise AgentError("denied", message, field="journal") from error
            self._tell(f"no journal, so that a kill means to start over: {path}: {error.strerror}")
        return None
