"""The checksum of an image as data daemons define it (blkhash of ovirt-imageio): H(H(block) …) over blocks of a size.

It is the same for every format and layout, and a block of zeros costs nothing: its digest is known.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from hostagent.client.local import Image, Reader
from hostagent.client.options import Options
from hostagent.client.remote import Remote
from hostagent.client.server import Server
from hostagent.errors import AgentError

_KEYED = ("blake2b", "blake2s")
BLOCK_LEAST, BLOCK_MOST = 4096, 64 << 20


@dataclass(frozen=True, slots=True)
class Checksum:
    algorithm: str
    block_size: int
    checksum: str


def refuse_unknown(algorithm: str, block_size: int) -> None:
    """AgentError invalid for what cannot be computed here."""
    if algorithm not in hashlib.algorithms_available or algorithm.startswith("shake_"):
        known = ", ".join(sorted(name for name in hashlib.algorithms_guaranteed if not name.startswith("shake_")))
        message = f"the algorithm {algorithm!r} is not known here"
        raise AgentError("invalid", message, field="algorithm", remedy=f"one of {known}")
    if not BLOCK_LEAST <= block_size <= BLOCK_MOST:
        message = f"blocks of {block_size} bytes are out of the range from {BLOCK_LEAST} to {BLOCK_MOST}"
        raise AgentError("invalid", message, field="block_size")


def local_checksum(
    image: Image, size: int, options: Options, done: Callable[[int], None], stop: threading.Event
) -> Checksum:
    """Of the image as one of `size` bytes: what it has less of are zeros. `done` hears how far it is."""
    refuse_unknown(options.algorithm, options.block_size)
    work = _Blocks(image, options, stop)
    outer = work.new()
    pending: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(options.workers, thread_name_prefix="checksum") as pool:
        try:
            for number, (begin, end, zero) in enumerate(_blocks(image, size, options.block_size)):
                pending.append(_known(work.zeros(end - begin)) if zero else pool.submit(work.digest, begin, end))
                if len(pending) > 4 * options.workers:
                    outer.update(pending.popleft().result())
                if number % 16 == 0:
                    done(begin)
            while pending:
                outer.update(pending.popleft().result())
        except BaseException:
            work.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            work.close()
    done(size)
    return Checksum(options.algorithm, options.block_size, outer.hexdigest())


def remote_checksum(server: Server, remote: Remote) -> Checksum:
    """The server's own, of the image that it has."""
    options = server.options
    if not server.features.checksum:
        raise AgentError("not_supported", f"{remote.address} computes no checksums", remedy="go without --verify")
    query = f"checksum?algorithm={options.algorithm}&block_size={options.block_size}"
    found = remote.json(query, server.dial.patience.checksum)
    try:
        said = Checksum(str(found["algorithm"]), int(found["block_size"]), str(found["checksum"]))
    except (TypeError, KeyError, ValueError) as error:
        raise AgentError("io_error", f"{remote.address} gave no checksum") from error
    if (said.algorithm, said.block_size) != (options.algorithm, options.block_size):
        message = f"{remote.address} computed {said.algorithm} over blocks of {said.block_size}, unasked"
        raise AgentError("io_error", message)
    return said


class _Blocks:
    """The digests of blocks; each thread has a reader of its own."""

    def __init__(self, image: Image, options: Options, stop: threading.Event) -> None:
        self._image = image
        self._options = options
        self._own = threading.local()
        self._readers: list[Reader] = []
        self._lock = threading.Lock()
        self._zeros = bytes(options.block_size)
        self._zero_digests: dict[int, bytes] = {}
        self.stop = stop

    def new(self) -> Any:
        if self._options.algorithm in _KEYED:
            return (hashlib.blake2b if self._options.algorithm == "blake2b" else hashlib.blake2s)(digest_size=32)
        return hashlib.new(self._options.algorithm, usedforsecurity=False)

    def zeros(self, length: int) -> bytes:
        if length not in self._zero_digests:
            self._zero_digests[length] = self._of(memoryview(self._zeros)[:length])
        return self._zero_digests[length]

    def digest(self, begin: int, end: int) -> bytes:
        if self.stop.is_set():
            raise AgentError("unproven", "the checksum was stopped")
        if not hasattr(self._own, "reader"):
            self._own.reader, self._own.block = self._image.reader(), bytearray(self._options.block_size)
            with self._lock:
                self._readers.append(self._own.reader)
        block, filled = self._own.block, 0
        length = end - begin

        def deliver(view: memoryview) -> None:
            nonlocal filled
            block[filled : filled + len(view)] = view
            filled += len(view)

        self._own.reader.read(begin, min(end, self._image.size), deliver)
        if filled < length:
            block[filled:length] = bytes(length - filled)
        if length == len(block) and block == self._zeros:
            return self.zeros(length)
        return self._of(memoryview(block)[:length])

    def _of(self, view: memoryview) -> bytes:
        inner = self.new()
        inner.update(view)
        return bytes(inner.digest())

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def _blocks(image: Image, size: int, block_size: int) -> Iterator[tuple[int, int, bool]]:
    """(begin, end, whether it is known for zeros) of each block."""
    extents = image.extents()
    covered, zero_from = 0, 0  # what the extents tell of so far, and where the zeros at its end begin
    for begin in range(0, size, block_size):
        end = min(begin + block_size, size)
        while covered < min(end, image.size):
            one = next(extents)
            covered = one.start + one.length
            if not one.zero:
                zero_from = covered
        yield begin, end, zero_from <= begin


def _known(digest: bytes) -> Future[bytes]:
    future: Future[bytes] = Future()
    future.set_result(digest)
    return future
