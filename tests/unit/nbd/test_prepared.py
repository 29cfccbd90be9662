"""A prepared chain, as threads see it that look at its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hostagent.images.chain import OpenChain, _Member
from hostagent.nbd.prepared import PreparedChain
from jobs.model import Chain, FileId, Layer


class Closing(OpenChain):
    """Closed, and let go by its chain, in the moment in which it is looked at."""

    prepared: PreparedChain

    @property
    def fds(self) -> tuple[int, ...]:
        self.prepared._opened = None
        self.close()
        return super().fds


def test_a_chain_that_is_closed_while_it_is_looked_at_has_no_descriptors(tmp_path: Path) -> None:
    path = tmp_path / "base.raw"
    path.write_bytes(b"x")
    found = path.stat()
    layer = Layer(str(path), "raw", FileId(found.st_dev, found.st_ino), 1, 4096)
    opened = Closing((_Member(os.open(path, os.O_RDONLY), layer, None),))
    registry: Any = None
    opened.prepared = PreparedChain(registry, opened, Chain((layer,)), shallow=False)
    assert opened.prepared.descriptor(layer.file) is None
