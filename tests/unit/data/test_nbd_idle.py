"""An NBD connection that is idle, or closed, keeps no memory for bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hostagent.nbddial import Fence, Server, Waits
from hostagent.nbdstream import IN_FLIGHT, PIECE, Stream
from tests.unit.data.nbd_fake import Behaviour, FakeServer

MANY = 32
WHOLE = IN_FLIGHT * PIECE


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) << 10


def test_idle_and_closed_connections_keep_no_buffers() -> None:
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        server = FakeServer(Path(folder) / "s", bytes(WHOLE), Behaviour())
        address, waits = Server("", f"{folder}/s"), Waits(20, 20, "a", "b")
        before = _anonymous()
        for _ in range(MANY):
            stream = Stream(address, waits, Fence())
            stream.read(0, WHOLE, len)
        idle = _anonymous() - before
        for _ in range(MANY):
            stream = Stream(address, waits, Fence())
            stream.read(0, WHOLE, len)
            stream.close()
        closed = _anonymous() - before
        server.close()
    kept = MANY * WHOLE  # of the idle ones, if they kept them
    assert idle < kept // 4
    assert closed < kept // 4
