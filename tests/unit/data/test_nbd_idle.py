"""An NBD connection that is idle, or closed, keeps no memory for bytes."""

from __future__ import annotations

import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from hostagent.nbdclient.dial import Fence, Server, Waits
from hostagent.nbdclient.stream import IN_FLIGHT, PIECE, Stream
from tests.unit.data.nbd_fake import Behaviour, FakeServer

MANY = 32
WHOLE = IN_FLIGHT * PIECE


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) << 10


def _growth(path: str) -> tuple[int, int]:
    """Of this process: with the connections idle, and when as many more have been closed."""
    address, waits = Server("", path), Waits(20, 20, "a", "b")
    before = _anonymous()
    idle = [Stream(address, waits, Fence()) for _ in range(MANY)]
    for stream in idle:
        stream.read(0, WHOLE, len)
    with_idle = _anonymous() - before
    for _ in range(MANY):
        stream = Stream(address, waits, Fence())
        stream.read(0, WHOLE, len)
        stream.close()
    return with_idle, _anonymous() - before


def test_idle_and_closed_connections_keep_no_buffers() -> None:
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        server = FakeServer(Path(folder) / "s", bytes(WHOLE), Behaviour())
        # In a process alone: the server, and what other tests left, would move the measure.
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            idle, closed = alone.submit(_growth, f"{folder}/s").result(60)
        server.close()
    kept = MANY * WHOLE  # of the idle ones, if they kept them
    assert idle < kept // 4
    assert closed < kept // 4
