"""The checksum of an image: H(H(block 0) ‖ H(block 1) ‖ …), the digest of ovirt-imageio's blkhash.

It depends on the bytes alone, not on how they are stored; so what an image's extents call zeros is not read, and its
digest is computed once. Blocks are hashed by several threads (hashlib lets go of the interpreter), each with a backend
of its own, and joined in their order; a few blocks are in memory, whatever the image's size.
"""

from __future__ import annotations

import functools
import hashlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from hostagent.data.backends.base import BackendSession, Extent, ImageBackend
from hostagent.data.streams import PIECE, Stopped, unreadable
from hostagent.errors import AgentError

ALGORITHM = "blake2b"
BLOCK, LEAST, MOST, GRAIN = 4 << 20, 1 << 20, 16 << 20, 4096
WORKERS = 3
"""For two processors: one may wait for its storage while the others hash."""
RUN_MOST = 4096
"""Digests of zeros that are joined at a time."""
_ZEROS = bytes(PIECE)
_GLANCE = 64


class Hash(Protocol):
    def update(self, data: memoryview | bytes | bytearray, /) -> None: ...

    def digest(self) -> bytes: ...

    def hexdigest(self) -> str: ...


@functools.cache
def algorithms() -> tuple[str, ...]:
    """Those that make a digest of one length, and that this host's OpenSSL allows; sorted."""
    return tuple(name for name in sorted(hashlib.algorithms_available) if _usable(name))


@dataclass(frozen=True, slots=True)
class Method:
    """How to hash. AgentError invalid for what cannot be."""

    algorithm: str = ALGORITHM
    block_size: int = BLOCK

    def __post_init__(self) -> None:
        if self.algorithm not in algorithms():
            message, known = f"Unsupported algorithm: {self.algorithm[:40]!r}", ", ".join(algorithms())
            raise _invalid("algorithm", self.algorithm, message, f"one of {known}")
        if not LEAST <= self.block_size <= MOST:
            message = f"Block size out of allowed range: {LEAST}-{MOST}"
            raise _invalid("block_size", self.block_size, message, "choose one within it")
        if self.block_size % GRAIN:
            message = f"Block size is not aligned to {GRAIN}"
            raise _invalid("block_size", self.block_size, message, f"choose a multiple of {GRAIN}")

    def new(self) -> Hash:
        return _new(self.algorithm)


def checksum(
    open_backend: Callable[[], ImageBackend],
    size: int,
    method: Method,
    *,
    workers: int = WORKERS,
    done: Callable[[int], None] = lambda number: None,
    pace: Callable[[int], None] = lambda number: None,
) -> str:
    """The digest of the image's first `size` bytes, in hexadecimal.

    `workers` threads and this one have a backend each; fewer, or this one alone, where not so many may read.
    `done` hears of the bytes of each block, read or known to be zeros, in order; `pace` of what was read, as it comes,
    and may keep it waiting. What either raises ends the work.
    """
    with ExitStack() as stack:
        backend = stack.enter_context(open_backend())
        readers = min(workers, backend.max_readers - 1)
        blocks = _Blocks(method, size, done, pace)
        others = list(_readers(open_backend, readers, stack)) if readers > 1 else []
        if len(others) < 2:
            return blocks.here(backend, stack.enter_context(backend.open_session()))
        return blocks.shared(backend, others)


def _readers(open_backend: Callable[[], ImageBackend], most: int, stack: ExitStack) -> Iterator[ImageBackend]:
    """As many as the storage lets in: an NBD server may say that it has room for several, and have less."""
    for _ in range(most):
        another = stack.enter_context(open_backend())
        try:
            another.size()
        except AgentError:
            return
        yield another


class _Blocks:
    def __init__(self, method: Method, size: int, done: Callable[[int], None], pace: Callable[[int], None]) -> None:
        self._method = method
        self._size = size
        self._done = done
        self._pace = pace
        self._joined = method.new()
        self._stop = threading.Event()
        self._digest_of_zeros = functools.cache(self._hash_zeros)

    def here(self, backend: ImageBackend, session: BackendSession) -> str:
        for first, last, zero in self._runs(backend):
            if zero:
                self._join_zeros(first, last)
                continue
            for offset, length in self._cut(first, last):
                self._joined.update(self._hash(session, offset, length))
                self._done(length)
        return self._joined.hexdigest()

    def shared(self, backend: ImageBackend, others: list[ImageBackend]) -> str:
        failures: list[BaseException] = []
        with ExitStack() as stack, ThreadPoolExecutor(len(others), "checksum") as pool:
            sessions: queue.SimpleQueue[BackendSession] = queue.SimpleQueue()
            for other in others:
                sessions.put(stack.enter_context(other.open_session()))

            def fail(error: BaseException) -> None:
                failures.append(error)
                self._stop.set()
                for other in others:
                    other.fence()  # or one that waits for its storage would be waited for

            def work(offset: int, length: int) -> bytes:
                session = sessions.get()
                try:
                    return self._hash(session, offset, length)
                except BaseException as error:
                    fail(error)
                    raise
                finally:
                    sessions.put(session)

            try:
                self._share(backend, lambda *block: pool.submit(work, *block), 2 * len(others))
            except BaseException as error:  # noqa: BLE001 - raised again, or what it came from
                fail(error)
                pool.shutdown(wait=False, cancel_futures=True)
                raise failures[0] from None
        return self._joined.hexdigest()

    def _share(self, backend: ImageBackend, submit: Callable[[int, int], Future[bytes]], most: int) -> None:
        under_way: deque[tuple[Future[bytes], int]] = deque()

        def join(left: int) -> None:
            while len(under_way) > left:
                future, length = under_way.popleft()
                self._joined.update(future.result())
                self._done(length)

        for first, last, zero in self._runs(backend):
            if zero:
                join(0)
                self._join_zeros(first, last)
                continue
            for offset, length in self._cut(first, last):
                under_way.append((submit(offset, length), length))
                join(most)
        join(0)

    def _runs(self, backend: ImageBackend) -> Iterator[tuple[int, int, bool]]:
        """(first byte, byte after the last one, all zeros), in whole blocks but for the image's end."""
        extents: Iterable[Extent] = [Extent(0, self._size, False)] if self._size else []
        if backend.supports_extents and self._size:
            extents = backend.extents(0, self._size)
        return runs(extents, self._size, self._method.block_size)

    def _cut(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        for offset in range(first, last, self._method.block_size):
            yield offset, min(self._method.block_size, last - offset)

    def _join_zeros(self, first: int, last: int) -> None:
        count, rest = divmod(last - first, self._method.block_size)
        digest = self._digest_of_zeros(self._method.block_size) if count else b""
        while count:
            number = min(count, RUN_MOST)
            self._joined.update(digest * number)
            self._done(number * self._method.block_size)
            count -= number
        if rest:
            self._joined.update(self._digest_of_zeros(rest))
            self._done(rest)

    def _hash(self, session: BackendSession, offset: int, length: int) -> bytes:
        block = _Block(self._method, self._stop, self._pace)
        session.copy_to(block, offset, length)
        return self._digest_of_zeros(length) if block.hash is None else block.hash.digest()

    def _hash_zeros(self, length: int) -> bytes:
        digest = self._method.new()
        _feed_zeros(digest, length)
        return digest.digest()


class _Block:
    """A Sink that hashes. `hash` is None as long as all was zeros, which is looked at faster than it is hashed."""

    def __init__(self, method: Method, stop: threading.Event, pace: Callable[[int], None]) -> None:
        self._method = method
        self._stop = stop
        self._pace = pace
        self._zeros = 0
        self.hash: Hash | None = None

    def write(self, data: memoryview | bytes | bytearray) -> None:
        if self._stop.is_set():
            raise Stopped
        self._pace(len(data))
        if self.hash is None:
            if _is_zero(data):
                self._zeros += len(data)
                return
            self.hash = self._method.new()
            _feed_zeros(self.hash, self._zeros)
        self.hash.update(data)

    def send_file(self, fd: int, offset: int, length: int) -> None:
        buffer = memoryview(bytearray(min(PIECE, length)))
        while length:
            try:
                number = os.preadv(fd, [buffer[: min(len(buffer), length)]], offset)
            except OSError as error:
                raise unreadable(error) from error
            if number == 0:
                raise AgentError("image_changed", f"the image's file ends at byte {offset}")
            self.write(buffer[:number])
            offset, length = offset + number, length - number


def runs(extents: Iterable[Extent], size: int, block: int) -> Iterator[tuple[int, int, bool]]:
    """Extents as runs of whole blocks: (first byte, byte after the last one, all zeros). A block that is data in part
    is data; AgentError internal when extents do not tell of every byte, rather than to take the rest for zeros."""
    decided = told = 0
    for one in extents:
        if one.start != told:
            raise AgentError("internal", f"extents leave bytes {told} to {one.start} out")
        told = one.start + one.length
        if one.zero:
            continue
        first, last = one.start // block * block, min(-(-told // block) * block, size)
        if first > decided:
            yield decided, first, True
            decided = first
        if last > decided:
            yield decided, last, False
            decided = last
    if told != size:
        raise AgentError("internal", f"extents tell of {told} bytes of {size}")
    if decided < size:
        yield decided, size, True


def _is_zero(data: memoryview | bytes | bytearray) -> bool:
    """A copy is compared at 10 GB/s, a memoryview at 0.6; most data shows at a glance."""
    if bytes(data[:_GLANCE]) != _ZEROS[: min(_GLANCE, len(data))]:
        return False
    return bytes(data) == (_ZEROS if len(data) == PIECE else bytes(len(data)))


def _feed_zeros(digest: Hash, length: int) -> None:
    while length:
        number = min(length, PIECE)
        digest.update(_ZEROS if number == PIECE else bytes(number))
        length -= number


def _new(algorithm: str) -> Hash:
    if algorithm in ("blake2b", "blake2s"):
        short: Callable[..., Hash] = getattr(hashlib, algorithm)
        return short(digest_size=32, usedforsecurity=False)
    return hashlib.new(algorithm, usedforsecurity=False)


def _usable(algorithm: str) -> bool:
    try:
        return hashlib.new(algorithm, usedforsecurity=False).digest_size > 0
    except ValueError:
        return False


def _invalid(field: str, value: object, message: str, remedy: str) -> AgentError:
    return AgentError("invalid", message, field=field, value=value, remedy=remedy)
