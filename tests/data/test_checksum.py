"""GET of an image's checksum. The digest is computed here a second time, from the definition."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.daemons import Daemon
from tests.data.exports import QemuNbd
from tests.data.table import Row, check, refused

MIB = 1 << 20
SIZE = 9 * MIB + 4096 + 1024  # the last block is a short one
BLOCK = 4 * MIB


def expected(content: bytes, block_size: int = BLOCK, algorithm: str = "blake2b") -> str:
    """The hash of the blocks' hashes."""

    def digest(data: bytes) -> hashlib._Hash:
        return hashlib.new(algorithm, data, **({"digest_size": 32} if algorithm.startswith("blake2") else {}))

    blocks = [content[at : at + block_size] for at in range(0, len(content), block_size)]
    return digest(b"".join(digest(block).digest() for block in blocks)).hexdigest()


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(MIB) + bytes(5 * MIB) + os.urandom(SIZE - 6 * MIB)


@pytest.fixture(scope="module", params=["nbd", "file"])
def ticket(daemon: Daemon, home: Path, content: bytes, request: pytest.FixtureRequest) -> Iterator[str]:
    image = home / "image.raw"
    with image.open("wb") as file:
        file.write(content)
    if request.param == "file":
        yield daemon.ticket(f"file://{image}", SIZE)
        return
    with QemuNbd(image, read_only=True) as server:
        yield daemon.ticket(server.url, SIZE)


def test_the_digest_of_the_blocks_digests(daemon: Daemon, ticket: str, content: bytes) -> None:
    with daemon.tcp() as wire:
        said = wire.ask("GET", f"/images/{ticket}/checksum").json
    assert said == {"algorithm": "blake2b", "block_size": BLOCK, "checksum": expected(content)}


@pytest.mark.parametrize(
    ("algorithm", "block_size"), [("blake2b", MIB), ("sha256", MIB + 4096), ("blake2s", 16 * MIB), ("md5", BLOCK)]
)
def test_other_blocks_and_algorithms(
    daemon: Daemon, ticket: str, content: bytes, block_size: int, algorithm: str
) -> None:
    with daemon.tcp() as wire:
        said = wire.ask("GET", f"/images/{ticket}/checksum?algorithm={algorithm}&block_size={block_size}").json
    assert said["checksum"] == expected(content, block_size, algorithm)


def test_every_algorithm_that_is_listed_works(daemon: Daemon, ticket: str, content: bytes) -> None:
    with daemon.tcp() as wire:
        listed = wire.ask("GET", "/images/nobody/checksum/algorithms").json["algorithms"]
        assert listed == sorted(listed) and {"blake2b", "sha256"} <= set(listed)
        for algorithm in listed:
            reply = wire.ask("GET", f"/images/{ticket}/checksum?algorithm={algorithm}")
            if reply.status == 500 and daemon.name == "imageio":
                continue  # it lists some that it has not
            assert reply.json["checksum"] == expected(content, algorithm=algorithm)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("block_size=1044480", "Block size out of allowed range: 1048576-16777216"),
        ("block_size=16781312", "Block size out of allowed range: 1048576-16777216"),
        ("block_size=1048577", "Block size is not aligned to 4096"),
        ("block_size=x", "Invalid block size: 'x'"),
        ("block_size=-1", "Block size out of allowed range|Invalid block size"),
        ("algorithm=crc32", "."),
        ("algorithm=", "."),
    ],
)
def test_what_cannot_be_computed(daemon: Daemon, ticket: str, query: str, message: str) -> None:
    with daemon.tcp() as wire:
        check(daemon, wire, Row("", "GET", f"/images/{ticket}/checksum?{query}", refused(400, message)))


def test_a_ticket_shorter_than_its_image(daemon: Daemon, home: Path, content: bytes, ticket: str) -> None:
    """The checksum of what the ticket lets one read; theirs is of the whole image."""
    short = daemon.ticket(f"file://{home / 'image.raw'}", 5 * MIB)
    with daemon.tcp() as wire:
        said = wire.ask("GET", f"/images/{short}/checksum").json
    assert said["checksum"] == expected(content[: 5 * MIB] if daemon.name == "ours" else content)


def test_a_tickets_rate_holds_for_what_a_checksum_reads(
    daemon: Daemon, home: Path, content: bytes, ticket: str
) -> None:
    if daemon.name != "ours":
        pytest.skip("no rates there")
    slow = daemon.ticket(f"file://{home / 'image.raw'}", SIZE, rate=8 * MIB)
    begin = time.monotonic()
    with daemon.tcp() as wire:
        said = wire.ask("GET", f"/images/{slow}/checksum").json
    assert said["checksum"] == expected(content)
    assert time.monotonic() - begin > 0.3  # of 4 MiB and more, but for the first ones
