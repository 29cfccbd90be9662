"""What a download is to make, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hostagent.client.journal import Identity


@dataclass(frozen=True, slots=True)
class Place:
    """What is to come to be, and of which image; see download.Download."""

    path: str
    format: str | None
    size: int
    backing: str | None
    backing_format: str | None
    incremental: bool
    preallocate: bool
    force: bool
    etag: str
    ticket: str

    @property
    def is_qcow2(self) -> bool:
        return self.format == "qcow2" or (self.format is None and self.path.endswith(".qcow2"))

    def identity(self, local: Any) -> Identity:
        how = {"format": "qcow2" if self.is_qcow2 else "raw", "backing": self.backing, "incremental": self.incremental}
        return Identity("download", local, self.size, how, self.etag, self.ticket)
