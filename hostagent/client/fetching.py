"""One worker of a download: a connection that reads, and the local file, or the storage daemon that writes it."""

from __future__ import annotations

from hostagent.client.crew import Passed
from hostagent.client.options import PIECE
from hostagent.client.rawimage import RawWriter
from hostagent.client.remote import Body, Remote
from hostagent.client.throttle import Throttle
from hostagent.nbdclient.stream import Stream


class _Fetcher:
    """What is written here stays when the server's connection breaks."""

    volatile = False

    def __init__(self, remote: Remote, throttle: Throttle) -> None:
        self._remote = remote
        self._throttle = throttle

    def connect(self) -> None:
        self._remote.connect()

    def abort(self) -> None:
        self._remote.abort()

    def close(self) -> None:
        self._remote.close()

    def _fill(self, body: Body, view: memoryview) -> int:
        number = body.fill(view[: self._throttle.step])
        self._throttle.take(number)
        return number


class RawFetcher(_Fetcher):
    """crew.Ends, into a raw file or a block device."""

    def __init__(self, remote: Remote, writer: RawWriter, throttle: Throttle) -> None:
        super().__init__(remote, throttle)
        self._writer = writer
        self._view = memoryview(bytearray(PIECE))

    def move(self, begin: int, end: int, passed: Passed) -> None:
        with self._remote.get(begin, end - begin) as body:
            while number := self._fill(body, self._view):
                self._writer.write(self._view[:number], begin)
                begin += number
                passed(number)

    def zero(self, begin: int, end: int) -> None:
        self._writer.zero(begin, end)

    def flush(self) -> None:
        self._writer.flush()


class StreamFetcher(_Fetcher):
    """crew.Ends, into an image that a storage daemon writes."""

    def __init__(self, remote: Remote, stream: Stream, throttle: Throttle) -> None:
        super().__init__(remote, throttle)
        self._stream = stream

    def move(self, begin: int, end: int, passed: Passed) -> None:
        with self._remote.get(begin, end - begin) as body:

            def fill(view: memoryview) -> int:
                passed(0)
                return self._fill(body, view)

            self._stream.write(fill, begin, end - begin, passed)  # what is in flight may still fail

    def zero(self, begin: int, end: int) -> None:
        self._stream.zero(begin, end - begin, sparse=True)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        super().close()
        self._stream.close()
